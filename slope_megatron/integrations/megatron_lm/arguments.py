"""Every argument of Megatron-LM's parser by name, and what it is to a model with `--slope`.

Of core 0.16.1, 0.17.1, 0.18.2, 0.19.0 and main, with those that ModelOpt and kitchen add. An argument works, has no
effect on linears, is refused (`refused.RULES`), or is read beside a refused one only. Each is in one place; a test
compares them with the upstream's parsers, so that a new argument has to be looked at.
"""

import argparse

from slope_megatron.integrations.megatron_lm.refused import RULES

# They do with 2:4 linears what they do with dense ones.
WORKS: dict[str, str] = {
    "the model and its attention": """
    activation_func_clamp_value add_bias_linear add_qkv_bias apply_query_key_layer_scaling
    apply_residual_connection_post_layernorm attention_backend attention_dropout attention_output_gate
    attention_softmax_in_fp32 decoder_num_layers decoder_seq_length encoder_num_layers encoder_seq_length
    ffn_hidden_size fp32_residual_connection glu_linear_offset group_query_attention hidden_dropout hidden_size
    kv_channels layernorm_epsilon normalization num_attention_heads num_layers num_query_groups openai_gelu qk_l2_norm
    qk_layernorm quick_geglu seq_length spec squared_relu swiglu untie_embeddings_and_output_weights
    """,
    "experts and their dispatch": """
    ep_overlap_early_attn_memory_release expert_model_parallel_size expert_tensor_parallel_size gtp_expert_remat_nccl_ub
    high_priority_a2a_comm_stream moe_apply_probs_on_input moe_aux_loss_coeff moe_combine_bwd_dtype moe_deepep_num_sms
    moe_dispatch_fwd_dtype moe_enable_deepep moe_enable_routing_replay moe_expert_capacity_factor
    moe_expert_rank_capacity_factor moe_extended_tp moe_ffn_hidden_size moe_flex_dispatcher_backend
    moe_flex_dispatcher_num_sms moe_grouped_gemm moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
    moe_hybridep_num_sms moe_hybridep_num_sms_preprocessing moe_hybridep_pad_uneven_dispatch_inputs moe_input_jitter_eps
    moe_layer_freq moe_layer_recompute moe_ncclep_static_shape moe_ncclep_zero_copy moe_pad_expert_input_to_capacity
    moe_pad_experts_for_cuda_graph_inference moe_per_layer_logging moe_permute_fusion moe_permute_fusion_into_hybridep
    moe_router_bias_update_rate moe_router_dtype moe_router_enable_expert_bias moe_router_force_biased
    moe_router_force_load_balancing moe_router_fusion moe_router_group_topk moe_router_load_balancing_type
    moe_router_num_groups moe_router_padding_for_fp8 moe_router_padding_for_quantization moe_router_pre_softmax
    moe_router_quantile_balancing_ema moe_router_score_function moe_router_topk moe_router_topk_scaling_factor
    moe_routing_trace_capture_hidden_states moe_routing_trace_capture_logits moe_routing_trace_dump_weights
    moe_routing_trace_max_training_iters moe_routing_trace_path moe_shared_expert_gate
    moe_shared_expert_intermediate_size moe_shared_expert_overlap moe_token_dispatcher_type moe_token_drop_policy
    moe_use_legacy_grouped_gemm moe_z_loss_coeff num_experts save_tokens_per_expert_interval
    use_fused_weighted_squared_relu
    """,
    "weights as they start": """
    embedding_init_method_std init_method_std perform_initialization seed use_cpu_initialization
    """,
    "numbers' formats": """
    accumulate_allreduce_grads_in_fp32 bf16 deterministic_mode disable_bf16_reduced_precision_matmul fp16
    grad_reduce_in_bf16 hysteresis initial_loss_scale loss_scale loss_scale_window min_loss_scale
    """,
    "layouts over ranks": """
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split align_grad_reduce align_param_gather
    ddp_average_in_collective ddp_bucket_size ddp_num_buckets ddp_pad_buckets_for_high_nccl_busbw
    ddp_param_name_patterns_for_fp32_local_accumulation ddp_reduce_scatter_with_fp32_accumulation
    decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers gradient_accumulation_fusion
    gradient_reduce_div_fusion microbatch_group_size_per_vp_stage num_distributed_optimizer_instances
    num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank overlap_grad_reduce
    overlap_p2p_comm_warmup_flush overlap_param_gather pipeline_model_parallel_layout pipeline_model_parallel_size
    sequence_parallel tensor_model_parallel_size use_distributed_optimizer use_tp_pp_dp_mapping
    """,
    "the step, its batches and its optimizer": """
    adam_beta1 adam_beta2 adam_eps apply_wd_to_qk_layernorm calculate_per_token_loss clip_grad decoupled_lr
    decoupled_min_lr decrease_batch_size_if_needed distribute_saved_activations end_weight_decay exp_avg_dtype
    exp_avg_sq_dtype global_batch_size iterations_to_skip lion_beta1 lion_beta2 lr lr_decay_iters lr_decay_samples
    lr_decay_style lr_warmup_fraction lr_warmup_init lr_warmup_iters lr_warmup_samples lr_wsd_decay_iters
    lr_wsd_decay_samples lr_wsd_decay_style main_grads_dtype main_params_dtype micro_batch_size min_lr
    mlp_chunks_for_training no_weight_decay_cond_type rampup_batch_size recompute_activations recompute_granularity
    recompute_method recompute_modules recompute_num_layers sgd_momentum start_weight_decay step_batch_size_schedule
    train_iters train_samples use_precision_aware_optimizer weight_decay weight_decay_incr_style
    """,
    "checkpoints: packed values and patterns are saved like other tensors": """
    async_ckpt_cpu_priority async_ckpt_io_priority async_ckpt_use_cpu_shm async_save async_strategy
    auto_detect_ckpt_format ckpt_assume_constant_structure ckpt_drop_redundant_extra_state ckpt_fully_parallel_load
    ckpt_fully_parallel_load_exchange_algo ckpt_fully_parallel_load_per_rank_objects
    ckpt_fully_parallel_load_process_group ckpt_fully_parallel_save ckpt_fully_parallel_save_deprecated
    ckpt_fully_parallel_save_process_group ckpt_load_validate_sharding_integrity ckpt_pg_tensors_cache_create
    ckpt_pg_tensors_cache_path ckpt_step dist_ckpt_format_deprecated dist_ckpt_optim_fully_reshardable
    dist_ckpt_save_pre_mcore_014 dist_ckpt_strictness dist_ckpt_workers distrib_optim_fully_reshardable_mem_efficient
    exit_on_missing_checkpoint finetune load load_main_params_from_ckpt no_load_optim no_load_rng no_save_optim
    no_save_rng non_persistent_ckpt_type non_persistent_global_ckpt_dir non_persistent_local_ckpt_algo
    non_persistent_local_ckpt_dir non_persistent_save_interval override_ckpt_iteration pretrained_checkpoint replication
    replication_factor replication_jump save save_activations_interval save_dgrads_interval save_interval
    save_params_interval save_retain_interval save_tokenizer_assets save_wgrads_interval stream_ckpt_dequant
    use_checkpoint_args use_dist_ckpt_deprecated use_mp_args_from_checkpoint_args use_persistent_ckpt_worker
    use_tokenizer_model_from_checkpoint_args verify_integrity
    """,
}

# They concern no linear of a block.
NO_EFFECT: dict[str, str] = {
    "embeddings, positions, output layer and loss": """
    add_position_embedding bert_binary_head clone_scatter_output_in_embedding create_attention_mask_in_dataloader
    cross_entropy_fusion_impl cross_entropy_loss_fusion defer_embedding_wgrad_compute fp16_lm_cross_entropy logit_dtype
    make_vocab_size_divisible_by max_position_embeddings mrope_section no_rope_freq position_embedding_type
    relative_attention_max_distance relative_attention_num_buckets rope_scaling_factor rope_type rotary_base
    rotary_interleaved rotary_percent rotary_seq_len_interpolation_factor use_rope_scaling
    use_rotary_position_embeddings wgrad_deferral_limit yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
    yarn_original_max_position_embeddings
    """,
    "fusions beside the linears, devices": """
    apply_rope_fusion bias_dropout_fusion bias_gelu_fusion bias_swiglu_fusion disable_jit_fuser
    empty_unused_memory_level enable_experimental masked_softmax_fusion no_persist_layer_norm te_rng_tracker
    use_flash_attn
    """,
    "process groups and how they talk": """
    disable_symmetric_registration distributed_backend distributed_timeout_minutes
    distributed_timeout_seconds_after_init fake_process_group flight_recorder_dump_on_timeout flight_recorder_dump_path
    flight_recorder_extra_dump_on_exec flight_recorder_include_only_active flight_recorder_include_stack_trace
    flight_recorder_trace_buffer_size high_priority_stream_groups lazy_mpu_init local_rank model_parallel_size
    nccl_communicator_config_path nccl_ub overlap_p2p_comm pipeline_model_parallel_comm_backend
    scatter_gather_tensors_in_pipeline sharp_enabled_group use_gloo_process_groups use_ring_exchange_p2p use_sharp
    """,
    "data and tokenizers": """
    allow_ambiguous_pad_tokens chat_template data_args_path data_cache_path data_path dataloader_defer_npy_index_mmap
    dataloader_fast_cache_load disable_msc_deprecated enable_msc eod_mask_loss fim_data fim_eod_token fim_fragment_rate
    fim_middle_token fim_no_prefix fim_pad_token fim_prefix_token fim_rate fim_split_sample fim_spm_rate
    fim_suffix_token legacy_tokenizer mask_prob merge_file metadata_path mid_level_dataset_surplus mmap_bin_files
    mock_data null_tokenizer_eod_id null_tokenizer_pad_id num_dataset_builder_threads num_workers
    object_storage_cache_path pad_vocab_size padded_vocab_size per_dataset_sequences_path per_split_data_args_path
    phase_transition_iterations reset_position_ids sample_rate short_seq_prob special_tokens split test_data_path
    tiktoken_num_special_tokens tiktoken_pattern tiktoken_special_tokens tokenizer_hf_include_special_tokens
    tokenizer_hf_no_include_special_tokens tokenizer_hf_no_use_fast tokenizer_hf_use_fast tokenizer_metadata
    tokenizer_model tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_sentencepiece_legacy
    tokenizer_special_tokens tokenizer_type train_data_path trust_remote_code use_gigatoken valid_data_path
    vocab_extra_ids vocab_file vocab_size
    """,
    "logs, and losses against logits of a file": """
    app_tag_run_name app_tag_run_version barrier_with_L1_time check_for_large_grads check_for_nan_in_loss_and_grad
    config_logger_dir disable_straggler_on_startup enable_one_logger log_device_memory_used log_energy log_interval
    log_loss_scale_to_tensorboard log_memory_interval log_memory_to_tensorboard log_num_zeros_in_grad log_params_norm
    log_progress log_straggler log_throughput log_timers_to_tensorboard log_validation_ppl_to_tensorboard
    log_world_size_to_tensorboard logging_level logits_load_decode_threads logits_load_dir logits_load_ignore_errors
    logits_load_kd_loss_alpha logits_load_msc_prefetch_depth logits_load_prefetch_factor logits_save_dir
    logits_save_dtype logits_save_top_k logits_save_top_p logits_save_top_p_min_k memory_snapshot_path nvtx_ranges
    one_logger_async one_logger_project one_logger_run_name otel_enabled otel_service_name otel_span_groups profile
    profile_ranks profile_step_end profile_step_start pytorch_profiler_collect_callstack pytorch_profiler_collect_chakra
    pytorch_profiler_collect_shapes record_memory_history record_shapes run_workload_inspector_server
    straggler_ctrlr_port straggler_minmax_count tensorboard_dir tensorboard_log_interval tensorboard_queue_size
    timing_log_level timing_log_option use_pytorch_profiler wandb_entity wandb_exp_name wandb_project wandb_save_dir
    """,
    "validation, and what watches a run": """
    adlr_autoresume adlr_autoresume_interval calc_ft_timeouts check_for_spiky_loss enable_ft_package
    error_injection_rate error_injection_type eval_global_batch_size eval_interval eval_iters eval_micro_batch_size
    fault_injector_delay_start_iteration fault_injector_fault_delay fault_injector_fault_probabilities
    fault_injector_fault_types fault_injector_mtti_seconds fault_injector_num_ranks fault_injector_offset_seconds
    fault_injector_ranks fault_injector_seed ft_num_warmup_iters full_validation inprocess_active_world_size
    inprocess_barrier_timeout inprocess_completion_timeout inprocess_empty_cuda_cache inprocess_granularity
    inprocess_hard_timeout inprocess_heartbeat_interval inprocess_heartbeat_timeout inprocess_last_call_wait
    inprocess_max_iterations inprocess_monitor_process_interval inprocess_monitor_thread_interval
    inprocess_progress_watchdog_interval inprocess_restart inprocess_soft_timeout inprocess_termination_grace_time
    multiple_validation_sets rerun_mode skip_train start_eval_at_iter test_mode validation_set_names
    """,
    "inference, which no training script does": """
    bert_embedder_type decode_only_cuda_graphs disable_chunked_prefill enable_chunked_prefill flash_decode
    inference_batch_times_seqlen_threshold inference_coordinator_port inference_cuda_graph_all_prefills
    inference_cuda_graph_max_tokens inference_cuda_graph_scope inference_disable_ep_consensus
    inference_disable_triton_nvls_kernels inference_dynamic_batching inference_dynamic_batching_async_sched_mode
    inference_dynamic_batching_block_size inference_dynamic_batching_buffer_size_gb
    inference_dynamic_batching_cuda_graph_max_tokens inference_dynamic_batching_cuda_graph_mixed_prefill_count
    inference_dynamic_batching_cuda_graph_sizing_distribution inference_dynamic_batching_enable_prefix_caching
    inference_dynamic_batching_logprobs_mode inference_dynamic_batching_mamba_memory_ratio
    inference_dynamic_batching_max_requests inference_dynamic_batching_max_tokens
    inference_dynamic_batching_num_cuda_graphs inference_dynamic_batching_paused_buffer_size_gb
    inference_dynamic_batching_prefix_caching_coordinator_policy
    inference_dynamic_batching_prefix_caching_eviction_policy inference_dynamic_batching_prefix_caching_mamba_gb
    inference_dynamic_batching_prefix_caching_routing_alpha inference_dynamic_batching_sampling_backend
    inference_dynamic_batching_track_generated_token_events inference_dynamic_batching_track_paused_request_events
    inference_dynamic_batching_unified_memory_level inference_fuse_tp_communication inference_grouped_gemm_backend
    inference_logging_step_interval inference_max_batch_size inference_max_requests inference_max_seq_length
    inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type inference_rng_tracker inference_shards
    inference_text_gen_server_logging inference_use_synchronous_zmq_collectives inference_wandb_logging
    max_tokens_to_oom mlp_chunks_for_prefill nccl_all_reduce_for_prefill num_speculative_tokens
    offset_sampling_seed_by_dp_rank output_bert_embeddings symmetric_ar_type use_legacy_static_engine
    """,
    "other scripts: retrieval and vision": """
    bert_load biencoder_projection_dim biencoder_shared_query_context_model block_data_path classes_fraction
    data_per_class_fraction data_sharding dino_bottleneck_size dino_freeze_last_layer dino_head_hidden_size
    dino_local_crops_number dino_local_img_size dino_norm_last_layer dino_teacher_temp dino_warmup_teacher_temp
    dino_warmup_teacher_temp_epochs embedding_path evidence_data_path head_lr_mult ict_head_size ict_load img_h img_w
    indexer_batch_size indexer_log_interval iter_per_epoch mask_factor mask_type num_channels num_classes patch_dim
    query_in_block_prob retriever_report_topk_accuracies retriever_score_scaling swin_backbone_type titles_data_path
    use_one_sent_docs vision_backbone_type vision_pretraining vision_pretraining_type
    """,
    "the course of a run; names that upstream has given up": """
    async_tensor_model_parallel_allreduce batch_size check_weight_hash_across_dp_replicas_interval
    checkpoint_activations dataloader_type deprecated_use_mcore_models dump_param_to_param_group_map
    enable_gloo_process_groups exit_duration_in_mins exit_interval exit_signal exit_signal_handler
    exit_signal_handler_for_dataloader exit_signal_handler_for_training gpu_sniff_test_interval help manual_gc
    manual_gc_eval manual_gc_interval onnx_safe override_opt_param_scheduler result_rejected_tracker_filename
    train_sync_interval use_checkpoint_opt_param_scheduler warmup
    """,
}

# Refused argument: those that are read beside it only. When it is served, they have to be looked at, too.
BESIDE: dict[str, str] = {
    "moe_paged_stash": """
    moe_paged_stash_buffer_size_factor_cpu moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size
    """,
    "moe_use_upcycling": "moe_upcycling_granularity",
    "multi_latent_attention": """
    cache_mla_latents kv_lora_rank mla_down_proj_fusion mscale mscale_all_dim q_lora_rank qk_head_dim
    qk_pos_emb_head_dim rotary_scaling_factor v_head_dim
    """,
    "mtp_num_layers": """
    freeze_base_for_mtp mtp_detach_heads mtp_hsm mtp_hybrid_override_pattern mtp_loss_scaling_factor mtp_standalone
    mtp_use_repeated_layer
    """,
    "experimental_attention_variant": """
    dsa_indexer_head_dim dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 dsa_indexer_loss_coeff dsa_indexer_n_heads
    dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_skip_topk_offset
    dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_use_sparse_loss dsa_kernel_backend gdp_cutedsl_kernel
    gdp_num_chunk_states_to_recompute gdp_num_householder linear_attention_freq linear_conv_kernel_dim
    linear_key_head_dim linear_num_key_heads linear_num_value_heads linear_value_head_dim
    """,
    "enable_mhc_connections": """
    mhc_init_gating_factor mhc_num_residual_streams mhc_recompute_layer_num mhc_sinkhorn_iterations
    """,
    "hybrid_layer_pattern": """
    mamba_head_dim mamba_inference_conv_states_dtype mamba_inference_ssm_states_dtype mamba_num_groups mamba_num_heads
    mamba_state_dim mamba_training_ssm_states_dtype use_mamba_mem_eff_path
    """,
    "use_mup": """
    mup_attn_scale_power mup_base_head_dim mup_base_hidden_size mup_embedding_mult mup_output_mult mup_width_mult
    """,
    "fp8": """
    first_last_layers_bf16 fp8_amax_compute_algo fp8_amax_history_len fp8_interval fp8_margin fp8_output_proj
    fp8_quantizer_factory fp8_recipe fp8_wgrad keep_fp8_transpose_cache num_layers_at_end_in_bf16
    num_layers_at_start_in_bf16 reuse_grad_buf_for_mxfp8_param_ag
    """,
    "fp4": "fp4_quantizer_factory fp4_recipe",
    "use_kitchen_attention": "kitchen_attention_backend",
    "batch_invariant_mode": "batch_invariant_backend",
    "tp_comm_overlap": """
    tp_comm_bootstrap_backend tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap_ag tp_comm_overlap_cfg
    tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs
    """,
    "context_parallel_size": "cp_comm_type hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank",
    "window_size": "window_attn_skip_freq",
    "qk_clip": "qk_clip_alpha qk_clip_threshold",
    "tensor_parallel_num_weight_shards": """
    gtp_remat_nccl_ub gtp_remat_opt_in_modules gtp_remat_reduce_scatter_with_fp32_accumulation
    """,
    "use_megatron_fsdp": """
    create_all_gather_group data_parallel_sharding_strategy enable_full_sharding_in_hsdp
    fsdp_db_use_persist_buf_on_alloc_fail fsdp_double_buffer fsdp_manual_registration
    megatron_fsdp_enable_fine_grained_param_gather megatron_fsdp_grad_comm_dtype megatron_fsdp_main_grads_dtype
    megatron_fsdp_main_params_dtype megatron_fsdp_max_pool_double_buffer megatron_fsdp_version
    outer_dp_sharding_strategy strict_fsdp_dtensor_load suggested_communication_unit_size
    """,
    "use_torch_fsdp2": "torch_fsdp2_reshard_after_forward",
    "optimizer": """
    muon_coefficient_type muon_extra_scale_factor muon_fp32_matmul_prec muon_momentum muon_nesterov muon_num_ns_steps
    muon_scalar_optimizer muon_scale_mode muon_split_qkv muon_tp_mode muon_use_nesterov muon_use_syrk
    use_layer_wise_param_layout
    """,
    "optimizer_cpu_offload": """
    optimizer_offload_fraction overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params
    use_torch_optimizer_for_cpu_offload
    """,
    "cuda_graph_impl": "cuda_graph_modules cuda_graph_scope cuda_graph_scope_deprecated cuda_graph_warmup_steps",
    "cpu_offloading_num_layers": "cpu_offloading_retain_pinned_cpu_buffers",
    "fine_grained_activation_offloading": """
    activation_offload_fraction delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks
    fine_grained_offloading_max_inflight_offloads min_offloaded_tensor_size offload_modules
    """,
    "perform_rl_step": """
    grpo_clamp_eps_lower grpo_clamp_eps_upper grpo_entropy_term_weight grpo_filter_groups_with_same_reward
    grpo_group_size grpo_iterations grpo_kl_beta grpo_prompts_per_step langrl_env_config langrl_external_server
    langrl_inference_server_conversation_template langrl_inference_server_type refit_method rl_consumption_granularity
    rl_default_temperature rl_default_top_k rl_default_top_p rl_durable_rollout_bank rl_generation_batch_size
    rl_generation_lag rl_importance_sampling_truncation_coef rl_inference_expert_model_parallel_size
    rl_inference_expert_tensor_model_parallel_size rl_inference_logprobs_is_correction
    rl_inference_model_unified_memory_level rl_inference_parsers rl_inference_pipeline_model_parallel_size
    rl_inference_tensor_model_parallel_size rl_kv_cache_management_mode rl_max_inflight_requests
    rl_num_parallel_generation_batches rl_num_parallel_generations rl_offload_inference_model_weights_when_idle
    rl_offload_kv_cache_during_training rl_offload_optimizer_during_inference rl_parallel_generation_tasks
    rl_partial_rollouts rl_persist_cuda_graphs rl_profile rl_profile_dir rl_prompts_per_eval
    rl_remove_kv_cache_during_training rl_reset_cuda_graphs rl_rollout_bank_dir rl_rollout_bank_max_bytes
    rl_sequence_packing_algo rl_sequence_packing_max_sequences_per_bin rl_skip_bos_token rl_submission_granularity
    rl_training_cuda_graphs rl_use_sequence_packing rl_verify_model_weights_swap
    """,
    "ckpt_convert_format": "ckpt_convert_save ckpt_convert_update_legacy_dist_opt_format",
    "modelopt_enabled": """
    enable_gpt_oss export_default_te_spec export_force_local_attention export_kd_teacher_ckpt_format
    export_kd_teacher_model_config export_kv_cache_quant export_legacy_megatron export_model_type
    export_moe_apply_probs_on_input export_offline_model export_qk_l2_norm export_quant_cfg export_real_quant_cfg
    export_te_mcore_model finetune_data_files finetune_data_split finetune_hf_dataset qad_train_target
    """,
    "sft": "sft_tokenizer_prompt_format",
}


def unknown(parser: argparse.ArgumentParser) -> list[str]:
    """Arguments of a parser that are in no group here: of a newer upstream, or a changed one."""
    known = {*names(WORKS, NO_EFFECT, BESIDE), *(rule.name for rule in RULES)}
    return sorted({action.dest for action in parser._actions} - known)


def names(*groups: dict[str, str]) -> list[str]:
    """The names of some of these groups."""
    return [name for group in groups for text in group.values() for name in text.split()]
