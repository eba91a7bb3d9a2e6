"""Alarms on sequences made for them: when they begin, what they say, when they are over; features; failing layers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import config_data
from torch import Tensor, nn

from pretrain.config import ALARMS
from pretrain.config.load import ConfigError, load_config, parse_config
from pretrain.diagnostics.alarms import CALM_LINES, Alarms, Change, Limit, Moment, Rule
from pretrain.diagnostics.clock import ForwardClock, SlowestRank
from pretrain.diagnostics.collapse import collapse_rules
from pretrain.diagnostics.features import feature_statistics, rankme
from pretrain.diagnostics.learning import BadSamples, Growth, Slow, Stalled, learning_rules
from pretrain.diagnostics.non_finite import find_in_backward, find_in_forward, find_in_weights, in_words
from pretrain.diagnostics.spikes import gradient_spikes
from pretrain.diagnostics.weights import piece_of
from pretrain.engines.engine import initialise_distributed
from pretrain.engines.schedules import Timeline
from pretrain.survival.run_folder import check_run_folder, write_config


def feed(rules: Sequence[Rule], lines: Sequence[dict[str, float]], every: int = 10, start: int = 0) -> list[Change]:
    """What is said over log lines that are `every` steps apart, 100 of them an epoch."""
    alarms = Alarms(rules)
    moments = (Moment(start + every * (i + 1), (start + every * (i + 1)) / 1000, line) for i, line in enumerate(lines))
    return [change for moment in moments for change in alarms.look(moment)]


def begun(changes: Sequence[Change]) -> list[str]:
    return [change.name for change in changes if change.begins]


def test_an_alarm_is_said_once_when_it_begins_and_once_when_it_is_over() -> None:
    limit = Limit("data_bound", "data_wait", 0.2, high=True, says="{value:.0%} of {limit:.0%}")
    waits = [0.1, 0.3, 0.25, 0.19, 0.3, *[0.1] * CALM_LINES, 0.1, 0.3]  # .19 is within the slack of one that stands
    changes = feed([limit], [{"data_wait": wait} for wait in waits])
    assert [(change.begins, change.text) for change in changes] == [
        (True, "30% of 20%"), (False, "over since step 80"), (True, "30% of 20%"),
    ]  # fmt: skip


def test_a_line_that_tells_nothing_leaves_an_alarm_as_it_is() -> None:
    limit = Limit("rank_collapsed", "rankme_share", 0.01, high=False, says="low")
    changes = feed([limit], [{"rankme_share": 0.001}, *[{}] * 20, {"rankme_share": 0.001}])
    assert begun(changes) == ["rank_collapsed"]
    assert len(changes) == 1


def test_an_alarm_ends_a_run_where_asked_and_once_it_has_stood() -> None:
    limit = Limit("slow", "speed", 1.0, high=False, says="slow")
    asked, not_asked = Alarms([limit], ["slow"], patience=3), Alarms([limit], ["data_bound"], patience=3)
    told = []
    for step in range(4):
        for alarms in (asked, not_asked):
            alarms.look(Moment(step, 0.0, {"speed": 0.5}))
        told.append(asked.fatal())
    assert told == [None, None, "slow", "slow"]
    assert not_asked.fatal() is None
    assert asked.metrics() == {"alarms": 1.0, "alarm/slow": 1.0}


PREDICTS_CODES = SimpleNamespace(target=SimpleNamespace(num_outputs=16))  # of a Method, what the alarms ask for


def dino_lines(**values: float) -> list[dict[str, float]]:
    metrics = {"loss": 3.0, "teacher_entropy": 2.0, "feature_std": 0.8, **values}
    return [metrics] * 4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, []),
        ({"loss": 4.15, "teacher_entropy": 4.158}, ["loss_at_ln_k", "teacher_uniform"]),
        ({"loss": 4.15}, ["loss_at_ln_k"]),
        ({"loss": 0.001, "teacher_entropy": 0.001}, ["teacher_one_prototype"]),
        ({"loss": 2.0, "teacher_entropy": 0.001}, []),  # sharp, but of several prototypes
        ({"feature_std": 0.01}, ["features_one_way"]),
        ({"rankme_share": 0.002}, ["rank_collapsed"]),
    ],
)
def test_the_ways_dino_collapses(shards: Path, tmp_path: Path, values: dict[str, float], expected: list[str]) -> None:
    config = parse_config(config_data("dino", "vit", shards, tmp_path))
    rules = collapse_rules(config, Timeline(10_000, 1000.0))
    changes = feed(rules, dino_lines(**values), start=1000)
    assert sorted(begun(changes)) == expected
    assert all("Lower" in change.text or "Raise" in change.text for change in changes)
    assert not feed(rules, dino_lines(**values))  # the first steps are spared


def test_the_patch_loss_counts_at_the_crops_that_are_masked(shards: Path, tmp_path: Path) -> None:
    data = config_data("dino", "vit", shards, tmp_path)
    data["method"] |= {"ibot": {"masked_share": 0.5, "separate_head": True, "prototypes": 100}}
    config = parse_config(data)
    rules = collapse_rules(config, Timeline(10_000, 1000.0))
    chance = math.log(100) / 2
    assert begun(feed(rules, dino_lines(dino=3.0, ibot=chance), start=1000)) == ["ibot_at_ln_k"]
    assert not feed(rules, dino_lines(dino=3.0, ibot=0.9 * chance), start=1000)


@pytest.mark.parametrize(
    ("method", "loss", "expected"),
    [
        ("mae", 0.99, ["loss_at_mean"]), ("mae", 0.9, []), ("mae", 1e-5, ["loss_at_zero"]),
        ("normalised_pixels", 1.0, ["loss_at_mean"]), ("mim", 0.99, []),
        ("codes", 2.77, ["loss_at_ln_k"]), ("codes", 2.5, []),
    ],
)  # fmt: skip
def test_what_is_predicted_when_nothing_is_learned(
    shards: Path, tmp_path: Path, method: str, loss: float, expected: list[str]
) -> None:
    config = parse_config(config_data(method, "vit", shards, tmp_path))
    rules = collapse_rules(config, Timeline(10_000, 1000.0), PREDICTS_CODES)
    assert begun(feed(rules, [{"loss": loss}] * 3, start=1000)) == expected


def test_spikes_are_told_from_noise_and_drift_and_counted() -> None:
    generator = np.random.default_rng(0)
    calm = [1.0 + 0.2 * value for value in generator.normal(size=2000)]
    rising = [value * (1 + step / 500) for step, value in enumerate(calm)]
    for values in (calm, rising):
        spikes = gradient_spikes()
        for step, value in enumerate(values):
            spikes.add(step, value)
        assert spikes.count == 0
    values = list(calm)
    values[500] = values[520] = values[1500] = 30.0
    values[600] = math.nan  # another alarm's
    spikes = gradient_spikes()
    alarms = Alarms([spikes])
    changes = []
    for step, value in enumerate(values):
        spikes.add(step, value)
        if step % 10 == 0:
            changes += alarms.look(Moment(step, 0.0, {}))
    assert spikes.count == 3
    assert [change.begins for change in changes] == [True, False, True, False]
    assert changes[0].text.startswith("the gradient norm was 30 in step 500 (expected: about its median of 0.995)")
    assert changes[2].text.count("3 such steps") == 1


def test_a_spike_now_and_then_is_counted_and_no_alarm_but_several_at_a_time_are() -> None:
    for steps in ((100, 250, 400), (100, 110, 120, 130, 140)):
        spikes = gradient_spikes()
        for step in range(500):
            spikes.add(step, 6.0 if step in steps else 1.0 + 0.1 * (step % 3))
            if begins := spikes.trouble(Moment(step, 0.0, {}), False) is not None:
                break
        assert begins is (len(steps) == 5)
        assert spikes.count == len(steps)


def test_a_spike_that_is_clipped_away_is_none() -> None:
    for clip, expected in ((0.0, 5), (2.0, 0), (6.0, 5)):
        spikes = gradient_spikes(clip)
        for step in range(200):
            spikes.add(step, 30.0 if step in (100, 110, 120, 130, 140) else 1.0 + 0.1 * (step % 3))
        assert spikes.count == expected


def test_a_loss_that_stalls_is_told_from_one_that_falls_slowly() -> None:
    generator = np.random.default_rng(0)
    slowly = [{"loss": 1.0 - 1e-4 * i + 0.02 * generator.normal()} for i in range(1000)]
    assert not feed([Stalled(1000)], slowly)
    flat = [{"loss": 0.5 + 0.02 * generator.normal()} for _ in range(1000)]
    changes = feed([Stalled(3000)], [*slowly[:100], *flat])
    assert begun(changes)[:1] == ["loss_stalled"]
    assert "since step" in changes[0].text


def test_a_run_that_slows_down_is_told_with_its_rank() -> None:
    rule = Slow(suspect=" Rank 3 on node-7 computes 2.0 times the ranks' median.")
    speeds = [100.0 + i % 7 for i in range(30)] + [50.0] * 5 + [100.0] * 5
    changes = feed([rule], [{"images_per_second": speed} for speed in speeds])
    assert [change.begins for change in changes] == [True, False]
    assert "50 images/s (the median of the last 31 log lines is 103)" in changes[0].text
    assert "Rank 3 on node-7" in changes[0].text


def test_the_slowest_rank_is_named_only_if_it_stands_out() -> None:
    ranks = SlowestRank(["a", "b", "c"])
    for _ in range(3):
        ranks.add([1.0, 1.1, 3.0])
    assert ranks.named() == " Rank 2 on c computes 2.7 times the ranks' median."
    ranks.add([1.0, 1.1, 1.2])
    assert ranks.named() == ""
    assert SlowestRank(["a"]).named() == ""


def test_the_clock_counts_forward_passes_and_nothing_else() -> None:
    module = nn.Identity()
    clock = ForwardClock(module, torch.device("cpu"))
    module.register_forward_hook(lambda *_: time.sleep(0.2))  # after it
    module.register_forward_pre_hook(lambda *_: time.sleep(0.01))  # within it
    for _ in range(3):
        module(torch.zeros(1))
    assert clock.read() >= 0.03
    assert clock.read() == 0.0


def test_bad_samples_are_told_when_their_share_rises() -> None:
    steady = np.cumsum(np.random.default_rng(0).poisson(3, 50))
    lines = [{"bad_samples": float(count)} for count in steady]
    assert not feed([BadSamples(batch_size=64)], lines)
    risen = [*lines, *({"bad_samples": float(steady[-1] + 100 * i)} for i in range(1, 4))]
    changes = feed([BadSamples(batch_size=64)], risen)
    assert begun(changes) == ["bad_samples_rise"]
    assert "100 of the 640 samples since step 500 could not be read" in changes[0].text


def test_weights_teacher_rate_and_waiting(shards: Path, tmp_path: Path) -> None:
    config = parse_config(config_data("dino", "vit", shards, tmp_path))

    def told(lines: Sequence[dict[str, float]]) -> list[str]:
        rules = learning_rules(config, Timeline(1000, 100.0), peak_rate=1e-3, warmup_steps=20)
        return begun(feed(rules, [{"loss": 1.0, "lr": 1e-3, **line} for line in lines]))

    assert told([{"weight_norm": 5.0}, {"weight_norm": 49.0}]) == []
    assert told([{"weight_norm": 5.0}, {"weight_norm": 51.0}]) == ["weights_grow"]
    assert told([{"lr": 0.0}, {"lr": 1e-4}]) == []  # warm-up
    assert told([{"lr": 1e-3}] * 3 + [{"lr": 1e-12}]) == ["rate_zero"]
    assert told([{"lr": 1e-3}] * 96 + [{"lr": 1e-12}]) == []  # the end
    assert told([{"data_wait": 0.9}] * 4) == []  # the first batches, and then two lines
    assert told([{"data_wait": 0.9}] * 5) == ["data_bound"]
    assert told([{"teacher_distance": 0.0}] * 5) == []  # they begin as one
    assert told([{"teacher_distance": 0.0}] * 6) == ["teacher_is_student"]
    moving = [{"teacher_distance": 0.1, "teacher_sum": float(i)} for i in range(3)]
    assert told(moving) == []
    assert told([*moving, moving[-1]]) == ["teacher_still"]
    assert Growth().can_tell(Moment(1, 0.0, {})) is False


def test_every_rule_has_a_name_that_is_known(shards: Path, tmp_path: Path) -> None:
    for method in ("mae", "dino", "codes", "dvae", "vqkd"):
        config = parse_config(config_data(method, "vit", shards, tmp_path))
        rules = [
            *collapse_rules(config, Timeline(100, 10.0), PREDICTS_CODES),
            *learning_rules(config, Timeline(100, 10.0), 1e-3, 0),
        ]
        assert {rule.name for rule in rules} <= set(ALARMS)


def test_rankme_is_the_published_formula_and_tells_a_collapse() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 20, generator=generator) * torch.linspace(0.1, 3, 20)
    singular = torch.linalg.svdvals(features.double())
    shares = singular / singular.sum() + 1e-7
    assert rankme(features) == pytest.approx(float((-shares * shares.log()).sum().exp()), rel=1e-6)
    assert rankme(features.T) == pytest.approx(rankme(features), rel=1e-3)
    assert rankme(torch.ones(50, 8)) == pytest.approx(1.0, abs=1e-3)
    assert rankme(torch.zeros(50, 8)) == 1.0
    assert rankme(torch.eye(8)) == pytest.approx(8.0, rel=1e-3)
    assert feature_statistics(torch.randn(2000, 64, generator=generator))["feature_std"] == pytest.approx(1.0, abs=0.05)
    assert feature_statistics(torch.ones(50, 8))["feature_std"] == pytest.approx(0.0, abs=1e-6)
    assert feature_statistics(torch.full((50, 8), torch.nan)) == {}


class Net(nn.Module):
    """A small network with a block in it whose parts may fail."""

    def __init__(self, fails: str = "") -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 1)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.fails = fails
        torch.manual_seed(0)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        values = self.block(self.first(images))
        if self.fails == "block":
            values = values / 0
        values = self.last(values)
        if self.fails == "root":
            values = values + (values - values).sqrt()
        return {"loss": (values / 0).mean() if self.fails == "loss" else values.mean()}


def test_of_nested_modules_the_innermost_is_named() -> None:
    images = torch.randn(3, 4)
    net = Net()
    assert find_in_forward(net, lambda: net(images)) is None
    assert find_in_backward(net, lambda: net(images)) is None
    handle = net.block[0].register_forward_hook(lambda module, inputs, output: output * torch.inf)
    found = find_in_forward(net, lambda: net(images))
    assert found is not None
    assert (found["layer"], found["kind"], found["where"], found["of"]) == ("block.0", "Linear", "forward", 12)
    handle.remove()
    net.block[0].register_forward_hook(lambda module, inputs, output: output + (output - output).sqrt())
    found = find_in_backward(net, lambda: net(images))
    assert found is not None
    assert (found["layer"], found["where"]) == ("block.0", "gradient")
    assert set(found["parameters"]) == {"first.weight", "first.bias", "block.0.weight", "block.0.bias"}


def test_what_is_no_module_is_named_by_what_it_reads() -> None:
    images = torch.randn(3, 4)
    for fails, where, layer in (
        ("block", "forward", "last"), ("loss", "forward", "Net"), ("root", "behind", "last"),
    ):  # fmt: skip
        net = Net(fails)
        found = find_in_forward(net, lambda net=net: net(images)) or find_in_backward(net, lambda net=net: net(images))
        assert found is not None
        assert (found["where"], found["layer"]) == (where, layer), fails
        assert layer in in_words(found)


def test_weights_that_are_not_finite_are_named() -> None:
    net = Net()
    assert find_in_weights(net) is None
    net.register_buffer("mask", torch.full((2,), -torch.inf))
    assert find_in_weights(net) is None
    with torch.no_grad():
        net.last.bias.fill_(math.nan)
    found = find_in_weights(net)
    assert found is not None
    assert in_words(found) == "weights of last.bias are not finite"


def test_diagnostics_may_change_between_two_starts(mae_data: dict[str, Any]) -> None:
    write_config(check_run_folder(parse_config(mae_data)), parse_config(mae_data))
    mae_data["diagnostics"] = {"stop_on": ["slow"], "skip_non_finite": 3, "knn_every_epochs": None}
    check_run_folder(parse_config(mae_data))


def test_an_alarm_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"diagnostics\.stop_on\.0: .*'data_bound'"):
        load_config("mae_vit_cifar_cpu", ["data.train=x", "diagnostics.stop_on=[databound]"])


def test_what_fills_up_the_last_piece_of_a_parameter_is_none_of_it() -> None:
    """ZeRO 3 divides a parameter into equal pieces; what is left of the last one was never written."""
    initialise_distributed(torch.device("cpu"))
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_tensor, parameter.ds_numel = torch.tensor([1.0, 2.0, 3.0, torch.nan]), 3
    assert piece_of(parameter).tolist() == [1.0, 2.0, 3.0]
    parameter.ds_numel = 9
    assert len(piece_of(parameter)) == 4
    assert piece_of(nn.Parameter(torch.ones(2))).tolist() == [1.0, 1.0]
