"""What benchmark.py compares is what it says, and every comparison can be made."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments import benchmark


def test_a_ratio_is_of_the_second_over_the_first_without_the_first_pair(monkeypatch):
    seconds = [99, 1] + [1, 2] + [2, 6] + [1, 4]  # of a and b, pair by pair: 2, 3 and 4 times
    clock = [t for i in range(len(seconds)) for t in (sum(seconds[:i]), sum(seconds[: i + 1]))]
    monkeypatch.setattr(benchmark.time, "perf_counter", iter(clock).__next__)
    assert benchmark.ratio(lambda: None, lambda: None, runs=3) == (2, 3, 4)


def test_the_floor_of_a_step_has_as_many_operations_as_the_step():
    a, b = torch.randn(600, 512), torch.randn(512, 1300)
    floor = benchmark.product_of(lambda: (a @ b, a @ b), "cpu")
    with FlopCounterMode(display=False) as counter:
        floor()
    assert counter.get_total_flops() == pytest.approx(2 * 2 * 600 * 512 * 1300, rel=1e-3)


def test_the_operations_of_attention_are_counted_both_ways():
    q, k, v = torch.randn(3, 2, 4, 64, 16, requires_grad=True).unbind()  # 2 images, 4 heads, 64 tokens
    product = 2 * 2 * 4 * 64 * 64 * 16  # of queries and keys, or of weights and values
    attend = torch.nn.functional.scaled_dot_product_attention
    assert benchmark.counted(lambda: attend(q, k, v).sum()).operations == 2 * product
    assert benchmark.counted(lambda: attend(q, k, v).sum().backward()).operations == 2 * product + 5 * product


def test_the_bytes_of_a_step_are_what_its_operations_read_and_write():
    x, one = torch.zeros(1000), torch.zeros(1)
    for work, moved in (
        (lambda: x + 1, 8000),  # 4 bytes a number: reads x, writes the sum
        (lambda: x.add_(1), 8000),
        (lambda: x.view(10, 100).t(), 0),
        (lambda: x + one.expand(1000), 8004),  # what is expanded is read once
    ):
        assert benchmark.counted(work).bytes == moved


ON_GPU = [
    f"{flags} --img-size 64 --embed-dim 24 --depth 1 --num-heads 3" for flags in benchmark.ON_GPU.values()
]


@pytest.mark.parametrize("flags", [*benchmark.PRETRAINING.values(), *ON_GPU])
def test_pretraining_steps_can_be_timed(flags):
    step = benchmark.pretraining_step(flags, benchmark.phantom(2, seed=0)[0])
    assert all(torch.tensor(value).isfinite() for value in step().values())


@pytest.mark.parametrize("name", [name for name in benchmark.CLASSIFIERS if "ViT-S" not in name])
def test_classifiers_can_be_compared(name):
    encoder, added, (_, channels, *size) = benchmark.CLASSIFIERS[name]
    narrow = f"{encoder} --embed-dim 16"
    for flags in (narrow, f"{narrow} {added}"):
        loss, use = benchmark.classifier(flags, (4, channels, *size), "cpu")
        assert benchmark.counted(lambda: loss().backward()).operations > 0
        assert use().shape == (4, 2)


def test_heatmaps_and_predictions_are_of_the_same_images(monkeypatch):
    monkeypatch.setattr(benchmark, "BATCH", 3)
    predict, explain = benchmark.heatmaps(f"{benchmark.RESNET} --embed-dim 16", "cpu")
    assert predict().shape == (3, 2) and explain().shape == (3, 1, 64, 64)
