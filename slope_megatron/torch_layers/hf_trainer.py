"""SlopeCallback: a sparse model in Hugging Face's `Trainer`.

model = sparsify(model)
trainer = Trainer(model=model, args=..., callbacks=[SlopeCallback()])
"""

from pathlib import Path

from transformers import TrainerCallback

from slope_megatron.torch_layers.linear import sparse_linears
from slope_megatron.torch_layers.saving import FILE, load_sparse_state
from slope_megatron.torch_layers.training import after_step, before_step


class SlopeCallback(TrainerCallback):
    """
    Args:
        resume_from: the folder given to `trainer.train(resume_from_checkpoint=...)`, where that is not the run's own.
    """

    def __init__(self, resume_from: str | None = None):
        self.resume_from = resume_from

    def on_init_end(self, args, state, control, model=None, **_):
        """Patterns are the same on every rank: DDP need not write them again before each forward."""
        if args.ddp_broadcast_buffers is None:
            args.ddp_broadcast_buffers = False

    def on_train_begin(self, args, state, control, model=None, **_):
        """A run that goes on: the Trainer has loaded plain weights; packed ones, patterns and adapters follow.

        Raises:
            ValueError: the model is not sparse, or the checkpoint lacks what the plain weights do not say.
        """
        if not sparse_linears(model):
            raise ValueError(
                "SlopeCallback and a model without sparse linears: call sparsify(model) before the Trainer"
            )
        if not state.global_step:
            return
        folder = Path(self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if (folder / FILE).is_file() or not is_sharded(folder):
            load_sparse_state(model, folder)

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        before_step(model)

    def on_step_end(self, args, state, control, model=None, **_):
        after_step(model, state.global_step, state.max_steps)


def is_sharded(folder: Path) -> bool:
    """Whether FSDP or DeepSpeed has written the model's own state dict, packed as it is."""
    return any(folder.glob("pytorch_model_fsdp*")) or any(folder.glob("global_step*"))
