"""Batches on their way to the device: in order, one ahead where there is one, and with their colours finished."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import config_data, write_shards

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.loader import Batch, Loader
from pretrain.config.load import ConfigError, dump_config, parse_config
from pretrain.stream.batches import DeviceSteps, ids_digest
from pretrain.stream.datasets import sampler_of
from pretrain.stream.loading import resolve_backend

CPU = torch.device("cpu")


class FakeLoader:
    """Steps numbered through, each in the memory of the one before the last."""

    def __init__(self, events: list[str], ready: bool) -> None:
        self.events, self.ready = events, ready

    def steps(self, start: int) -> Iterator[list[Batch]]:
        buffers = [torch.zeros(2, 2, dtype=torch.int64) for _ in range(2)]
        for step in range(start, start + 100):
            buffer = buffers[step % 2]
            buffer.fill_(step)
            self.events.append(f"load {step}")
            yield [Batch(ids=buffer, rows=torch.arange(2), global_crops=buffer)]  # type: ignore[typeddict-item]
            buffer.fill_(-1)  # given back


class FakeStream:
    """Records when it is entered and handed over."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def __enter__(self) -> None:
        self.events.append("aside")

    def __exit__(self, *exception: object) -> None:
        self.events.append("back")

    def hand_over(self, micro_batches: list[Batch]) -> None:
        self.events.append(f"hand over {int(micro_batches[0]['ids'][0, 0])}")


def device_steps(events: list[str], ready: bool, monkeypatch: pytest.MonkeyPatch) -> DeviceSteps:
    """As on a GPU, whose copies are clones here."""
    monkeypatch.setattr(
        "pretrain.stream.batches.to_device",
        lambda batch, device: {name: tensor.clone() for name, tensor in batch.items()},
    )
    return DeviceSteps(FakeLoader(events, ready), 5, CPU, side=FakeStream(events))  # type: ignore[arg-type]


def test_a_step_that_is_ready_is_copied_while_the_one_before_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    steps = device_steps(events, True, monkeypatch)
    for number in range(5, 9):
        (batch,), digest = next(steps)
        events.append(f"compute {number}")
        assert batch["ids"].unique().tolist() == [number]
        assert digest == ids_digest(batch)
    assert events[:8] == ["aside", "load 5", "back", "hand over 5", "aside", "load 6", "back", "compute 5"]
    assert events[8:13] == ["hand over 6", "aside", "load 7", "back", "compute 6"]


def test_a_step_that_is_not_ready_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    steps = device_steps(events, False, monkeypatch)
    for number in range(5, 8):
        (batch,), _ = next(steps)
        events.append(f"compute {number}")
        assert batch["ids"].unique().tolist() == [number]
    assert events[:5] == ["aside", "load 5", "back", "hand over 5", "compute 5"]
    assert events[5:10] == ["aside", "load 6", "back", "hand over 6", "compute 6"]


@pytest.mark.parametrize("backend", ["opencv", "device"])
def test_on_the_cpu_batches_pass_through(tmp_path: Path, backend: str) -> None:
    write_shards(tmp_path, 40)
    data = config_data("dino", "vit", tmp_path, tmp_path / "runs", data={"backend": backend})
    config = parse_config(data)
    with open_dataset(tmp_path) as dataset:
        loaders = [Loader(sampler_of(config, (dataset,)), config.views, backend=backend) for _ in range(2)]
        loaded, steps = loaders[0].steps(3), DeviceSteps(loaders[1], 3, CPU)
        for _ in range(3):
            (plain,), ((batch,), digest) = next(loaded), next(steps)
            assert digest == ids_digest(plain)
            assert set(batch) == set(plain) - {"global_colours", "local_colours"}
            same = torch.equal(batch["global_crops"], plain["global_crops"])
            assert same == (backend == "opencv")  # else they are coloured on the way
        for loader in loaders:
            loader.close()


def test_a_run_keeps_its_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(config_data("mae", "vit", tmp_path, tmp_path / "runs"))
    folder = tmp_path / "runs" / config.name
    folder.mkdir(parents=True)
    monkeypatch.setattr("data_pipelines.transforms.backends.native.BUILT", True)
    begun = resolve_backend(config)
    assert begun.data.backend == "native"
    (folder / "config.yaml").write_text(dump_config(begun))
    assert resolve_backend(config) == begun
    monkeypatch.setattr("data_pipelines.transforms.backends.native.BUILT", False)
    with pytest.raises(ConfigError, match=r"makes its crops by native, which is missing here.*build_ext"):
        resolve_backend(config)
    other = config_data("mae", "vit", tmp_path, tmp_path / "elsewhere")
    assert resolve_backend(parse_config(other)).data.backend == "opencv"
    asked = config_data("mae", "vit", tmp_path, tmp_path / "elsewhere", data={"backend": "native"})
    with pytest.raises(ConfigError, match=r"data\.backend: .*not built"):
        resolve_backend(parse_config(asked))


def test_repeats_must_fit_the_batch(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch_size 8 is no multiple of data\.repeated_augmentation = 3"):
        parse_config(config_data("mae", "vit", tmp_path, tmp_path, data={"repeated_augmentation": 3}))
