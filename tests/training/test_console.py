"""What a person reads of a run, from given figures."""

from slope_megatron.config import Config, DataConfig, ModelConfig, SlopeConfig, TrainConfig
from slope_megatron.training.telemetry import console

STEP = {"step": 20, "loss": 2.5, "learning_rate": 6e-4, "tokens_per_second": 1234.4}


def test_a_step_in_one_line():
    known = {**STEP, "mfu": 0.415, "peak_memory_gib": 10.2}
    expected = "step 20/100 | loss 2.5000 | lr 6.00e-04 | 1,234 tokens/s | MFU 41.5% | 10.20 GiB | skipped 3"
    assert console.step_line(known, 100, 3) == expected
    assert console.step_line(STEP, 100, 0) == "step 20/100 | loss 2.5000 | lr 6.00e-04 | 1,234 tokens/s | skipped 0"


def table(**slope):
    config = Config(
        model=ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4),
        slope=SlopeConfig(**slope),
        data=DataConfig(seq_length=32, global_batch_size=8),
        train=TrainConfig(steps=100),
    )
    text = console.start_table(config, 512, 4, 12_800, {"weights": 2**30, "optimizer": 2**31})
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def test_the_table_at_the_start():
    rows = table(nm="2:4", adapter_rank=4)
    dense = table(enabled=False)
    assert rows["tokens"] == "25,600 in 100 steps: 2.00 epochs of 12,800"
    assert rows["layout"] == "TP 1 x PP 1 x DP 4 = 4, ZeRO stage 1"
    assert rows["memory"].startswith("3.00 GiB planned on rank 0")
    count, stored = (int(part.split()[0].replace(",", "")) for part in rows["parameters"].split(", "))
    whole = int(dense["parameters"].split()[0].replace(",", ""))
    # Half of 21 h^2 are kept, and rank 4 adds 4 (in + out) for each of the 7 sparse linears.
    adapters = 4 * 64 * (1 + 3 + 2 * (1 + 1 + 1 + 4 + 4 + 1))
    assert count == whole and stored == whole - 21 * 64 * 64 // 2 + adapters
