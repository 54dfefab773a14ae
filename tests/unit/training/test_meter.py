"""The meter against a clock that the test moves."""

import pytest
import torch

from ds_recipes.config.plan import Plan, make_plan
from ds_recipes.config.schema import Config, DataConfig, RunConfig
from ds_recipes.models.flops import ModelFlops
from ds_recipes.training.meter import StepMeter, peak_flops, peak_memory_gib

CPU = torch.device("cpu")
FLOPS = ModelFlops(matmul_parameters=1000, attention_width=8, attention_windows=(None,))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plan_of(world_size: int) -> Plan:
    return make_plan(Config(run=RunConfig(max_steps=10), data=DataConfig(context_size=16)), world_size)


def run_steps(meter: StepMeter, clock: Clock, steps: int, data: float, rest: float, tokens: int) -> None:
    for _ in range(steps):
        meter.start_step()
        clock.now += data
        meter.data_ready()
        clock.now += rest
        meter.end_step(tokens)


@pytest.mark.parametrize("steps", [1, 3])
def test_rates_are_means_since_the_last_reading_without_what_lies_between_steps(steps: int) -> None:
    clock = Clock()
    meter = StepMeter(plan_of(4), FLOPS, CPU, 1e6, clock)
    for _ in range(2):
        run_steps(meter, clock, steps, data=0.5, rest=1.5, tokens=800)
        clock.now += 1000  # evaluation, a save
        read = meter.read()
        assert read["step_seconds"] == pytest.approx(2.0)
        assert read["data_seconds"] == pytest.approx(0.5)
        assert read["tokens_per_sec"] == pytest.approx(400.0)
        assert read["tokens_per_sec_per_rank"] == pytest.approx(100.0)
        assert read["mfu"] == pytest.approx(100 * FLOPS.per_token(16) / 1e6)
    assert meter.longest_step_seconds == pytest.approx(2.0)


def test_nothing_is_divided_by_zero() -> None:
    clock = Clock()
    meter = StepMeter(plan_of(1), FLOPS, CPU, 1e6, clock)
    assert {meter.read()[name] for name in ("tokens_per_sec", "mfu", "step_seconds", "data_seconds")} == {None}
    run_steps(meter, clock, 1, data=0.0, rest=0.0, tokens=5)
    read = meter.read()
    assert read["tokens_per_sec"] is None and read["mfu"] is None and read["step_seconds"] == 0.0


@pytest.mark.parametrize(
    "name, flops",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA GeForce RTX 4090", None),
        (None, None),
    ],
)
def test_peaks_of_known_devices_in_bf16_only(name: str | None, flops: float | None) -> None:
    assert peak_flops(name, "bf16") == flops
    assert peak_flops(name, "fp32") is None


def test_an_unknown_peak_makes_mfu_unknown() -> None:
    clock = Clock()
    meter = StepMeter(plan_of(1), FLOPS, CPU, None, clock)
    run_steps(meter, clock, 1, data=0.0, rest=1.0, tokens=5)
    read = meter.read()
    assert read["mfu"] is None and read["tokens_per_sec"] == 5.0


def test_memory_is_the_peak_of_this_process() -> None:
    before = peak_memory_gib(CPU)
    held = bytearray(b"x" * (200 << 20))
    after = peak_memory_gib(CPU)
    del held
    assert after - before > 0.1
    assert peak_memory_gib(CPU) >= after


def test_a_reading_is_of_the_steps_since_the_last_one_alone() -> None:
    clock = Clock()
    meter = StepMeter(plan_of(1), FLOPS, CPU, 1e6, clock)
    run_steps(meter, clock, 2, data=1.0, rest=9.0, tokens=10)
    assert meter.read()["step_seconds"] == pytest.approx(10.0)
    run_steps(meter, clock, 3, data=0.5, rest=0.5, tokens=50)
    read = meter.read()
    assert read["step_seconds"] == pytest.approx(1.0) and read["tokens_per_sec"] == pytest.approx(50.0)
    assert meter.longest_step_seconds == pytest.approx(10.0), "of all steps, for the deadline"
    assert meter.read()["step_seconds"] is None
