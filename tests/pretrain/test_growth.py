"""Data that change while a run goes on: told by name, refused, or adopted at an epoch's end, exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import column, run_all
from tiny import config_data, write_shards

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.rng import Purpose, Stream, permutation
from data_pipelines.sampler import Row, Sampler
from pretrain.config.auto_hparams import resolve_auto
from pretrain.config.load import ConfigError, parse_config
from pretrain.methods.base import Normalisation
from pretrain.stream.batches import ids_digest
from pretrain.stream.datasets import open_datasets, sampler_of, sources, weights_of
from pretrain.stream.growth import continued, opened_at, pin
from pretrain.stream.loading import check_ranks_agree, loader_of
from pretrain.stream.normalisation import keep_normalisation, pooled
from pretrain.survival.run_folder import check_run_folder, write_config


def add_shard(folder: Path, number: int, num_images: int) -> Path:
    """One more shard of a set, with other images."""
    making = folder.parent / f"making-{number}"
    making.mkdir()
    write_shards(making, num_images, shards=1)
    shutil.move(making / "train-000000.tar", folder / f"train-{number:06d}.tar")
    return folder / f"train-{number:06d}.tar"


@pytest.fixture
def growing(shards: Path, tmp_path: Path) -> Path:
    """A copy of the 120 images to which a test adds."""
    folder = tmp_path / "growing"
    folder.mkdir()
    for shard in shards.glob("train-*.tar"):
        shutil.copy2(shard, folder)
    return folder


def fresh(folder: Path) -> Sampler:
    return Sampler((open_dataset(folder),), seed=1, batch_size=16, window=16, names=("growing",))


def rows(sampler: Sampler, steps: range) -> list[list[Row]]:
    return [sampler.rows(step, range(sampler.batch_size)) for step in steps]


def shown_later(sampler: Sampler, steps: range, first: int) -> list[list[Row]]:
    """The rows of these steps as a run shows them as data set 1 from step `first` on, in the order of its own steps."""
    sampler.is_permuted = False
    found = []
    for step, batch in enumerate(rows(sampler, steps), first):
        places = permutation(Stream(sampler.seed, Purpose.ROWS, step), len(batch)).tolist()
        found.append([batch[place]._replace(dataset=1) for place in places])
    return found


def begin(folder: Path, run: Path) -> dict[str, Any]:
    """A run's pinned data, and the state that its checkpoints hold."""
    sampler = fresh(folder)
    run.mkdir()
    pin(run, sampler.datasets)
    return json.loads(json.dumps(sampler.state()))


def test_changes_are_refused_by_name(growing: Path, tmp_path: Path) -> None:
    state = begin(growing, tmp_path / "run")
    before = rows(fresh(growing), range(10))
    add_shard(growing, 2, 30)
    with pytest.raises(ConfigError, match=r"growing: 1 new shard \(train-000002.tar\).*data.adopt=next_epoch"):
        continued(state, fresh(growing), 3, tmp_path / "run", adopt=False)
    (growing / "train-000000.tar").unlink()
    shutil.copy(growing / "train-000002.tar", growing / "train-000001.tar")
    told = (
        r"1 new shard \(train-000002.tar\), 1 missing shard \(train-000000.tar\), 1 changed shard \(train-000001.tar\)"
    )
    with pytest.raises(ConfigError, match=told):
        continued(state, fresh(growing), 3, tmp_path / "run", adopt=False)
    with pytest.raises(ConfigError, match=r"is shown growing as it was.*missing: train-000000.tar"):
        continued(state, fresh(growing), 3, tmp_path / "run", adopt=True)
    at_the_end, told_change = continued(state, fresh(growing), 7, tmp_path / "run", adopt=True)  # no more needed
    assert at_the_end.segments[-1].start_step == 7
    assert "from step 7 on" in str(told_change)
    shutil.rmtree(tmp_path / "run" / "data")
    with pytest.raises(ConfigError, match=r"120 samples then, 60 now"):
        continued(state, fresh(growing), 3, tmp_path / "run", adopt=False)
    assert len(before) == 10


def test_rows_stay_as_the_run_began_with_them(growing: Path, tmp_path: Path) -> None:
    state = begin(growing, tmp_path / "run")
    del state["rows"]  # as of a checkpoint of before they were permuted
    sampler, told = continued(state, fresh(growing), 3, tmp_path / "run", adopt=False)
    assert told is None
    assert sampler.state() == state
    assert rows(sampler, range(3, 5)) != rows(fresh(growing), range(3, 5))
    add_shard(growing, 2, 60)
    grown, _ = continued(state, fresh(growing), 3, tmp_path / "run", adopt=True)
    assert "rows" not in grown.state()
    assert rows(grown, range(3, 5)) == rows(sampler, range(3, 5))


@pytest.mark.parametrize("change", [{"seed": 2}, {"window": 32}, {"batch_size": 32}, {"repeats": 2}])
def test_another_order_is_refused_whatever_the_configuration_says(
    growing: Path, tmp_path: Path, change: dict[str, int]
) -> None:
    state = begin(growing, tmp_path / "run")
    settings = {"seed": 1, "batch_size": 16, "window": 16} | change
    now = Sampler((open_dataset(growing),), names=("growing",), **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{next(iter(change))} = [0-9]+, now it is .*other batches"):
        continued(state, now, 3, tmp_path / "run", adopt=True)


def test_an_earlier_shard_that_changed_is_refused_by_name(growing: Path, tmp_path: Path) -> None:
    state = begin(growing, tmp_path / "run")
    shutil.copy(growing / "train-000001.tar", growing / "train-000000.tar")
    with pytest.raises(ConfigError, match=r"changed: train-000000.tar. Bring them back"):
        continued(state, fresh(growing), 3, tmp_path / "run", adopt=True)


@pytest.mark.parametrize("resumed", [(1, 3, 6), (6, 7, 9), (7, 8, 20), (5, 13, 22)])
def test_adopted_data_are_shown_exactly_whatever_is_killed_when(
    growing: Path, tmp_path: Path, resumed: tuple[int, ...]
) -> None:
    """Before, at and after the boundary; `data.adopt` is needed only until a checkpoint has written it down."""
    state, run = begin(growing, tmp_path / "run"), tmp_path / "run"
    old = rows(fresh(growing), range(40))
    add_shard(growing, 2, 40)
    boundary = -(-resumed[0] // 7) * 7
    new = Sampler((open_dataset(growing),), seed=1, batch_size=16, window=16)  # 160 samples, 10 steps a pass
    offset = boundary // 7 * 10  # it begins with the pass that follows
    expected = old[:boundary] + shown_later(new, range(offset, offset + 40 - boundary), boundary)
    shown, at = old[: resumed[0]], resumed[0]
    for until in (*resumed[1:], 40):
        sampler, _ = continued(state, fresh(growing), at, run, adopt=at == resumed[0])
        pin(run, sampler.datasets)
        shown += rows(sampler, range(at, until))
        state, at = json.loads(json.dumps(sampler.state())), until
    assert shown == expected
    for step in range(40):  # looked at afterwards
        past = opened_at(step, Sampler.continued(state, {}), fresh(growing), run)
        assert rows(past, range(step, step + 1)) == [expected[step]]
    assert list(sampler.datasets) == ([1] if resumed[-1] >= boundary else [0, 1])


def test_ranks_that_see_other_data_are_refused_together(
    growing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a file system shows a new shard to one node before the others."""
    other = shutil.copytree(growing, tmp_path / "of-another-node" / "copied")
    known = Normalisation((0.5,), (0.5,))
    told: list[torch.Tensor] = []

    def gather(all_ranks: torch.Tensor, mine: torch.Tensor) -> None:
        told.append(mine.clone())
        all_ranks.copy_(torch.cat([told[0], mine]))

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", gather)

    def check(folder: Path, normalisation: Normalisation) -> None:
        config = parse_config(config_data("mae", "vit", folder, tmp_path))
        with loader_of(config, sampler_of(config, open_datasets(config.data))) as loader:
            check_ranks_agree(loader, normalisation, 2, torch.device("cpu"))

    check(growing, known)
    check(other, known)
    with pytest.raises(ConfigError, match=r"normalises by .*0\.4.*rank 0 by other numbers"):
        check(growing, Normalisation((0.4,), (0.5,)))
    add_shard(other, 2, 30)
    with pytest.raises(ConfigError, match="is to show 150 samples in 3 shards, but rank 0 something else"):
        check(other, known)


def test_data_that_came_back_are_as_if_nothing_had_been(growing: Path, tmp_path: Path) -> None:
    state, run = begin(growing, tmp_path / "run"), tmp_path / "run"
    expected = rows(fresh(growing), range(20))
    added = add_shard(growing, 2, 40)
    sampler, _ = continued(state, fresh(growing), 2, run, adopt=True)
    state = json.loads(json.dumps(sampler.state()))
    pin(run, sampler.datasets)
    added.unlink()
    for step in (5, 7):  # what was never shown is forgotten
        sampler, told = continued(state, fresh(growing), step, run, adopt=False)
        assert told is None
        assert rows(sampler, range(step, 20)) == expected[step:]
    with pytest.raises(ConfigError, match=r"missing shard \(train-000002.tar\)"):
        continued(state, fresh(growing), 8, run, adopt=False)


def test_a_run_trains_on_over_the_boundary(growing: Path, tmp_path: Path) -> None:
    """Grown in the middle of an epoch, killed again after its end, on other ranks: what it saw is what was to be."""
    data = config_data("mae", "vit", growing, tmp_path, train={"steps": 24})
    fresh_sampler = sampler_of(parse_config(data), open_datasets(parse_config(data).data))
    expected = rows(fresh_sampler, range(15))
    for turn, stop in enumerate((5, 18, 24)):
        data["checkpoint"] = {"every_steps": stop, "keep_last": 100}
        run_all([data], 2 if turn == 2 else 1, tmp_path)
        for path in (tmp_path / "mae-vit" / "checkpoints").glob("step-*"):  # a kill leaves no more
            if int(path.name[5:]) > stop:
                shutil.rmtree(path)
        data["data"]["adopt"] = "next_epoch"
        if turn == 0:
            add_shard(growing, 2, 60)
    grown = sampler_of(parse_config(data), open_datasets(parse_config(data).data))  # 22 steps a pass
    expected += shown_later(grown, range(22, 31), 15)
    assert column(data, "step") == list(range(1, 25))
    assert column(data, "ids_digest") == [digest(batch) for batch in expected]
    state = json.loads((tmp_path / "mae-vit/checkpoints/step-00000024/state.json").read_text())
    segments = state["state"]["order"]["segments"]
    assert [segment["start_step"] for segment in segments] == [0, 15]
    assert [segment["parts"][0]["num_samples"] for segment in segments] == [120, 180]


def digest(batch: list[Row]) -> int:
    ids = torch.tensor([[row.dataset, row.sample] for row in batch])
    return ids_digest({"ids": ids, "rows": torch.arange(len(batch))})  # type: ignore[typeddict-item]


def test_auto_settings_and_normalisation_stay_as_they_began(growing: Path, tmp_path: Path) -> None:
    data = config_data("dino", "vit", growing, tmp_path)
    data["method"]["prototypes"] = data["method"]["teacher_momentum"] = "auto"
    (growing / "dataset.json").write_text(json.dumps({"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]}))
    config = parse_config(data)
    begun, _ = resolve_auto(config, 30_000)
    begun = keep_normalisation(begun, open_datasets(config.data))
    assert begun.data.mean == (0.1, 0.2, 0.3)
    write_config(tmp_path / data["name"], begun)
    (growing / "dataset.json").write_text(json.dumps({"mean": [0.5, 0.5, 0.5], "std": [0.3, 0.2, 0.1]}))
    later, told = resolve_auto(config, 600_000, begun)
    later = keep_normalisation(later, open_datasets(config.data))
    assert later == begun
    assert "as when the run began" in told[0]
    check_run_folder(later)


def test_several_data_sets_by_configuration(growing: Path, shards: Path, tmp_path: Path) -> None:
    data = config_data("mae", "vit", shards, tmp_path)
    add_shard(growing, 2, 40)
    mixed = [{"path": str(shards), "weight": 3}, {"path": f"{growing}/train-*.tar", "weight": 1, "name": "more"}]
    data["data"]["train"] = mixed
    config = parse_config(data)
    datasets = open_datasets(config.data)
    sampler = sampler_of(config, datasets)
    assert [source.name for source in sources(config.data)] == [shards.name, "more"]
    assert weights_of(config.data, datasets) == [3, 1]
    drawn = [row.dataset for step in range(20) for row in sampler.rows(step, range(8))]
    assert (drawn.count(0), drawn.count(1)) == (120, 40)
    assert "more (160 samples)" in sampler.summary()
    write_config(tmp_path / data["name"], config)
    mixed[1]["path"] = str(growing)  # the shards may move, the weights not
    check_run_folder(parse_config(data))
    mixed[1]["weight"] = 2
    with pytest.raises(ConfigError, match=r"data.train.1.weight: 1.0 -> 2.0"):
        check_run_folder(parse_config(data))
    mixed[1].pop("weight")
    with pytest.raises(ConfigError, match="give it to all of them or to none"):
        parse_config(data)
    mixed[1]["wieght"] = 2
    with pytest.raises(ConfigError, match=r"unknown key data.train.1.wieght; did you mean .*weight"):
        parse_config(data)


def test_statistics_of_a_mixture_are_those_of_all_its_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.rand(1000, 3, generator=generator) * scale for scale in (1.0, 0.5)]

    known = [
        Normalisation(tuple(values.mean(0).tolist()), tuple(values.std(0, correction=0).tolist())) for values in pixels
    ]
    together = torch.cat([pixels[0].repeat(3, 1), pixels[1]])
    found = pooled(known, [3, 1])
    assert found.mean == pytest.approx(together.mean(0).tolist(), abs=1e-5)
    assert found.std == pytest.approx(together.std(0, correction=0).tolist(), abs=1e-5)
