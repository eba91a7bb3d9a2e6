"""The whole probe, on shards and an encoder made on the fly; and what it refuses before any work."""

import json
import math
import shutil

import pytest
import timm
import torch
from rich.console import Console

from eval import baselines
from eval.embed import embed
from eval.probe import run_probe
from eval.protocol import score
from eval.report import markdown_table, probe_table
from eval.scores import wilson
from eval.splits import open_splits
from eval.target import open_target, run_of
from pretrain.encoder_folder import find_encoder
from pretrain.encoders import build_encoder
from pretrain.encoders.saved import EncoderCard, save_encoder
from pretrain.encoders.vit.config import VitConfig
from pretrain.interop.export import export_encoder
from pretrain.tracking.probes import Accuracy

pytestmark = pytest.mark.filterwarnings("ignore:k = ")  # 200 neighbours of 60 samples

ENCODER = VitConfig(size="tiny", dim=12, depth=2, heads=2, patch=4)


@pytest.fixture
def data(tmp_path, write_shard):
    write_shard(tmp_path / "data" / "train-000000.tar", [0, 1, 2] * 20)
    write_shard(tmp_path / "data" / "val-000000.tar", [0, 1, 2] * 8, seed=1)
    return tmp_path / "data"


def save(folder, step=40, seed=3):
    torch.manual_seed(seed)
    card = EncoderCard(ENCODER, (16, 16), 3, (0.5,) * 3, (0.25,) * 3, "dino", "class", step, 1.5, "small")
    save_encoder(folder, build_encoder(ENCODER, (16, 16), 3).state_dict(), card)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "small"
    (folder / "checkpoints" / "step-20").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: small\n")
    save(folder / "checkpoints" / "step-20" / "encoder", step=20)
    (folder / "checkpoints" / "latest").write_text("step-20\n")
    return folder


def quick(target, data, **more):
    return run_probe(str(target), str(data), device="cpu", epochs=3, seeds=(0, 1), progress=False, **more)


def test_probe_from_shards_to_tables(run, data, monkeypatch):
    save(run / "encoder")
    logged = {}
    monkeypatch.setattr(
        "pretrain.tracking.probes.log_probe",
        lambda folder, step, scores, *more: logged.update({folder: (step, scores)}),
    )
    results = quick(run, data, untrained_seeds=(0, 1), also=("logistic",))
    (written,) = (run / "eval").glob("probe-40-*.json")
    assert json.loads(written.read_text()) == json.loads(json.dumps(results))

    rows = results["rows"]
    assert rows["chance"] == {"uniform": pytest.approx(1 / 3), "most_frequent_class": pytest.approx(1 / 3)}
    assert set(rows["pretrained"]["knn"]) == {"class", "mean"}
    assert set(rows["pretrained"]["knn"]["class"]) == {"10", "20", "100", "200"}
    assert rows["pixels"]["knn"]["pixels"]["20"]["top1"] > 0.5  # brightness follows the label
    linear = rows["pretrained"]["linear"]
    assert set(linear["top1_of_seed"]) == {"0", "1"}
    share = linear["top1"]
    assert linear["standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / 24))
    assert len(rows["untrained"]) == 2
    assert rows["untrained"][0] != rows["untrained"][1]
    assert results["protocol"]["features"] == "cached centre crops"
    step, scores = logged[run]
    assert step == 40
    assert scores["linear"] == Accuracy(share, linear["standard_error"])
    assert scores["knn"].share == rows["pretrained"]["knn"]["class"]["20"]["top1"]

    console = Console(width=160, record=True)
    console.print(probe_table(results))
    for text in (console.export_text(), markdown_table(results)):
        for piece in (
            "chance",
            "raw pixels",
            "untrained",
            "pretrained",
            "k-NN class*",
            "linear: on",
            "logistic: on",
            "±",
        ):
            assert piece in text
        assert f"{100 * share:.1f} ± {100 * linear['standard_error']:.1f}" in text


def test_probing_again_is_equal_and_does_not_redo_the_baselines(run, data, monkeypatch, cache):
    first = quick(run, data)
    assert len(list((cache / "probes").iterdir())) == 2
    monkeypatch.setattr("eval.rows.pixels", None)
    monkeypatch.setattr("pretrain.encoders.saved.fresh_encoder", None)
    again = quick(run, data)
    assert again["rows"] == first["rows"]
    assert len(list((run / "eval").glob("probe-20-*.json"))) == 1


def test_a_probe_without_bars_tells_what_it_is_at(run, data, capsys, cache):
    """In a job's log nothing else is seen until the table is."""
    quick(run, data)
    said = capsys.readouterr().err
    for line in (
        "pretrained: features of",
        "pretrained: k-NN: ",
        "pretrained: linear: ",
        "untrained, seed 0: ",
        "pixels: ",
    ):
        assert line in said


def test_a_probe_replaces_only_its_own_earlier_result(run, data):
    for size in (16, 8, 8):
        quick(run, data, image_size=size)
    sizes = [json.loads(p.read_text())["target"]["image_size"] for p in (run / "eval").glob("probe-20-*.json")]
    assert sorted(sizes) == [8, 16]


def test_untrained_is_the_same_encoder_with_fresh_weights(run):
    target = open_target(str(run))
    state = torch.get_rng_state()
    first, same, other = (target.untrained(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    trained = target.encoder.state_dict()
    key = next(key for key in trained if key.endswith("qkv.weight"))
    assert set(first) == set(trained)
    assert torch.equal(first[key], same[key])
    assert not torch.equal(first[key], other[key])
    assert not torch.equal(first[key], trained[key])


def test_every_way_to_name_an_encoder(run):
    inner = run / "checkpoints" / "step-20" / "encoder"
    for folder in (run, inner, inner.parent):
        assert find_encoder(folder) == inner
        assert run_of(find_encoder(folder)) == run
    save(run / "encoder")
    assert find_encoder(run) == run / "encoder"  # the final one comes first
    assert run_of(run / "encoder") == run
    alone = run.parent / "alone"
    save(alone)
    assert run_of(alone) is None
    assert open_target(str(alone)).results == alone / "eval" / "probe-40.json"
    for name in ("a", "b"):  # exported files that lie side by side
        export_encoder(alone, run.parent / f"{name}.safetensors", "safetensors")
        results = open_target(str(run.parent / f"{name}.safetensors")).results
        assert results == run.parent / "eval" / f"probe-{name}-40.json"


def test_no_encoder_says_what_there_is(run):
    (run / "checkpoints" / "latest").unlink()
    with pytest.raises(FileNotFoundError, match=r"it holds checkpoints, config\.yaml"):
        open_target(str(run))
    with pytest.raises(FileNotFoundError, match="holds small"):
        open_target(str(run.with_name("smal")))


def test_image_size(run):
    assert open_target(str(run)).image_size == 16
    assert open_target(str(run), image_size=24).image_size == 24
    with pytest.raises(ValueError, match="such as 16 or 20"):
        open_target(str(run), image_size=18)


def test_timm_names(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="vit_tiny_patch16_224"):
        open_target("timm:vit_tiny_patch16_242")

    def no_network(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(ValueError, match=r"could not be loaded \(ConnectionError: no route to host\)"):
        open_target("timm:vit_tiny_patch16_224")


def test_data_that_cannot_be_probed(tmp_path, data, write_shard):
    write_shard(tmp_path / "half" / "train-000000.tar", [0, 1])
    with pytest.raises(FileNotFoundError, match=r"--val-share 0\.1"):
        open_splits(str(tmp_path / "half"))
    with pytest.raises(ValueError, match="is one shard"):
        open_splits(str(data / "train-000000.tar"))
    write_shard(tmp_path / "mixed" / "train-000000.tar", [0, 1])
    write_shard(tmp_path / "mixed" / "train-000001.tar", [1, 0])
    with pytest.raises(ValueError, match=r"1 shard both in train and in val, the first of them .*train-000001\.tar"):
        open_splits(str(tmp_path / "mixed"), str(tmp_path / "mixed" / "train-000001.tar"))
    with pytest.raises(ValueError, match="same samples"):
        open_splits(str(data / "train-000000.tar"), str(data / "train-000000.tar"))
    write_shard(tmp_path / "other" / "val-000000.tar", [7, 8, 9])
    with pytest.raises(ValueError, match=r"no class of val is in train: train has the labels 0 \.\. 2, val 7 \.\. 9"):
        open_splits(str(data), str(tmp_path / "other"))
    write_shard(tmp_path / "none" / "val-000000.tar", [None, None])
    with pytest.raises(ValueError, match="none of the 2 val samples has a label"):
        open_splits(str(data), str(tmp_path / "none"))
    write_shard(tmp_path / "one" / "train-000000.tar", [2, 2])
    with pytest.raises(ValueError, match="needs two"):
        open_splits(str(tmp_path / "one"), str(data / "val-000000.tar"))


def test_cache_survives_damage_and_tells_keys_apart(cache):
    calls = []

    def compute(value):
        return lambda: calls.append(value) or {"value": value}

    assert baselines.cached({"a": 1}, compute(1)) == {"value": 1}
    assert baselines.cached({"a": 2}, compute(2)) == {"value": 2}
    assert baselines.cached({"a": 1}, compute(3)) == {"value": 1}
    for entry in (cache / "probes").iterdir():
        entry.write_text("{")
    assert baselines.cached({"a": 1}, compute(4)) == {"value": 4}
    assert calls == [1, 2, 4]


def test_labels_of_any_range_are_the_classes_they_are(run, data, tmp_path, write_shard):
    """Ten classes named 900000 .. 900009 took 23.7 GB."""
    far = {0: 900_000, 1: 900_004, 2: 2_000_000_000}
    plain, sparse = quick(run, data), None
    for name, labels, seed in (("train", [0, 1, 2] * 20, 0), ("val", [0, 1, 2] * 8, 1)):
        write_shard(tmp_path / "far" / f"{name}-000000.tar", labels, seed=seed, names=far)
    sparse = quick(run, tmp_path / "far")
    for results, names in ((plain, "012"), (sparse, map(str, far.values()))):
        rows = results["rows"]
        told = [
            row["linear"]["measures"].pop("names") for row in (rows["pretrained"], rows["pixels"], *rows["untrained"])
        ]
        assert told == [list(names)] * len(told)
    assert sparse["rows"] == plain["rows"]
    assert (sparse["data"]["classes"], sparse["data"]["num_classes"]) == (list(far.values()), 3)


def test_images_of_val_that_are_in_train_are_counted(run, data, tmp_path, write_shard, capsys):
    write_shard(tmp_path / "twins" / "train-000000.tar", [0, 1, 2] * 20)
    write_shard(tmp_path / "twins" / "val-000000.tar", [0, 1, 2] * 2)  # of the same seed: train's first six
    line = (
        "6 of 6 val images are in train as well, to the pixel "
        "(val-000000-00000, val-000000-00001, val-000000-00002, ...): every accuracy here is too good"
    )
    results = quick(run, tmp_path / "twins")
    assert line in results["warnings"]
    assert f"warning: {line}" in capsys.readouterr().err
    assert line in markdown_table(results)
    assert not any("in train as well" in warning for warning in quick(run, data)["warnings"])


def test_a_probe_of_a_few_images_says_how_little_it_knows(run, data):
    results = quick(run, data)
    assert "only 24 val images: read the intervals, not the shares" in results["warnings"]
    best = results["rows"]["pretrained"]["knn"]["class"]["20"]
    assert best["interval"] == pytest.approx(wilson(best["top1"], 24))
    assert "[{:.1f}, {:.1f}]".format(*(100 * end for end in best["interval"])) in markdown_table(results)


def test_test_is_the_split_to_test_on_where_there_is_no_val(tmp_path, data):
    (data / "val-000000.tar").rename(data / "test-000000.tar")
    splits = open_splits(str(data))
    assert (splits.held_out, splits.val.num_samples) == ("test", 24)


def test_an_option_that_no_probe_has_is_refused(run, data):
    with pytest.raises(ValueError, match=r"full is a setting of none of knn, linear; .*logistic"):
        quick(run, data, full=True)


@pytest.fixture
def patients(tmp_path, write_shard):
    """Sixty images to learn from, five a patient, whom the `.json` names as text or number."""

    def write(*of_val):
        folder = tmp_path / "patients"
        write_shard(folder / "train-000000.tar", [0, 1, 2] * 20, jsons=[{"patient": str(n // 5)} for n in range(60)])
        write_shard(folder / "val-000000.tar", [0, 1, 2] * 2, seed=1, jsons=[{"patient": who} for who in of_val])
        return folder

    return write


def test_groups_and_keys_reach_the_probes(run, patients, monkeypatch):
    stores = []
    monkeypatch.setattr("eval.rows.score", lambda store, protocol: stores.append(store) or score(store, protocol))
    results = quick(run, patients(90, 90, "91", "91", 92, 92), group_by="patient")
    assert results["data"]["group_by"] == "patient"
    for store in stores:  # of pixels too
        assert store.train.groups.tolist() == [n // 5 for n in range(60)]
        assert store.val.groups.tolist() == [12, 12, 13, 13, 14, 14]
        assert store.val.keys[1] == "val-000000-00001"
        assert list(store.val.keys[4:]) == ["val-000000-00004", "val-000000-00005"]
    quick(run, patients(90, 90, "91", "91", 92, 92))
    assert stores[-1].train.groups is None
    assert len(list((run / "eval").glob("probe-20-*.json"))) == 2  # another protocol, another file


@pytest.mark.parametrize(
    ("of_val", "field", "message"),
    [
        ((90, 0, 1, 1, 3, 90), "patient", r"3 of 13 groups by patient are in train and in val \(0, 1, 3\); .*too good"),
        (
            (90,) * 6,
            "subject",
            r"sample train-000000-00000 of .* belongs to no group: .* as subject \(it has patient\)",
        ),
        ((90, 90, None, 90, 90, 90), "patient", r"sample val-000000-00002 .*patient is None"),
        ((90, [1], 90, 90, 90, 90), "patient", r"sample val-000000-00001 .*patient is \[1\]"),
        ((90, 90, 90, 90, 90, True), "patient", r"sample val-000000-00005 .*patient is True"),
    ],
)
def test_groups_that_are_in_both_splits_or_missing_are_refused(patients, of_val, field, message):
    with pytest.raises(ValueError, match=message):
        open_splits(str(patients(*of_val)), group_by=field)


def test_train_that_no_probe_can_choose_on_is_refused_before_any_work(run, tmp_path, write_shard, monkeypatch):
    monkeypatch.setattr("eval.sources.FeatureSource.features", None)
    write_shard(tmp_path / "one" / "train-000000.tar", [0, 1, 2] * 4, jsons=[{"patient": "a"}] * 12)
    write_shard(tmp_path / "one" / "val-000000.tar", [0, 1, 2], seed=1, jsons=[{"patient": "b"}] * 3)
    with pytest.raises(ValueError, match="has one group, so none can be held out"):
        quick(run, tmp_path / "one", group_by="patient")


def described_by(folder, key):
    (folder / "dataset.json").write_text(json.dumps({"groups": {"key": key, "splits": {}}}))
    return folder


def test_shards_packed_by_groups_are_probed_by_them(run, patients):
    folder = described_by(patients(90, 90, "91", "91", 92, 92), "patient")
    results = quick(run, folder)
    assert results["data"]["group_by"] == "patient"
    assert "images of one patient are never in train and val, nor in both parts of train" in markdown_table(results)
    assert any("6 val images are of 3 groups by patient" in line for line in results["warnings"])
    with pytest.raises(ValueError, match="belongs to no group"):
        open_splits(str(described_by(folder, "site")))


def test_groups_that_nobody_asked_for_and_that_are_too_few_are_left(run, tmp_path, write_shard):
    write_shard(tmp_path / "one" / "train-000000.tar", [0, 1, 2] * 4, jsons=[{"patient": "a"}] * 12)
    write_shard(tmp_path / "one" / "val-000000.tar", [0, 1, 2], seed=1, jsons=[{"patient": "b"}] * 3)
    results = quick(run, described_by(tmp_path / "one", "patient"))
    assert results["data"]["group_by"] is None
    assert any("train has too few groups by patient" in line for line in results["warnings"])


def test_samples_without_a_label_need_no_group(tmp_path, write_shard):
    jsons = [{"patient": "a"}, {}, {"patient": "b"}]
    write_shard(tmp_path / "half" / "train-000000.tar", [0, None, 1], jsons=jsons)
    write_shard(tmp_path / "half" / "val-000000.tar", [0, 1], seed=1, jsons=[{"patient": "c"}] * 2)
    train, val = open_splits(str(tmp_path / "half"), group_by="patient").groups
    assert (train.tolist(), val.tolist()) == ([0, -1, 1], [2, 2])


def test_features_are_computed_once_for_all_probes(run, data, monkeypatch, cache):
    first = quick(run, data)
    assert len(list((cache / "features").glob("*/complete.json"))) == 4  # of both encoders and splits
    monkeypatch.setattr("eval.sources.write_arrays", None)
    again = quick(run, data, also=("logistic",))
    assert again["rows"]["pretrained"]["knn"] == first["rows"]["pretrained"]["knn"]
    assert "logistic" in again["rows"]["untrained"][0]


def test_a_store_is_probed_by_itself_or_in_the_place_of_its_encoder(run, data, monkeypatch, tmp_path):
    embed(str(run), str(data), tmp_path / "store", progress=False, say=lambda line: None)
    known = quick(run, data)
    monkeypatch.setattr("eval.sources.write_arrays", None)
    for target, more in ((run, {"store": tmp_path / "store"}), (tmp_path / "store", {})):
        found = quick(target, data, **more)
        assert found["rows"] == known["rows"]
        assert found["target"]["arithmetic"] == "fp32"
    shutil.rmtree(run / "checkpoints" / "step-20")
    save(run / "checkpoints" / "step-20" / "encoder", step=20, seed=5)
    with pytest.raises(ValueError, match="by now it is another encoder; name the encoder as TARGET"):
        quick(tmp_path / "store", data)
    shutil.rmtree(run)
    with pytest.raises(ValueError, match="which can't be opened"):
        quick(tmp_path / "store", data)


def test_images_are_changed_before_every_row_encodes_them(run, data, monkeypatch):
    from eval.probes import robustness

    variants = robustness._variants

    def two(settings, seed):
        found = list(variants(settings, seed))
        return [(kind, changes[:1]) for kind, changes in (found[0], found[-1])]

    monkeypatch.setattr(robustness, "_variants", two)

    results = quick(run, data, only=("robustness",))
    (written,) = (run / "eval").glob("probe-20-*.json")
    assert written.with_suffix(".npz").is_file()
    for row in (results["rows"]["pretrained"], results["rows"]["untrained"][0], results["rows"]["pixels"]):
        found = row["robustness"]
        assert set(found["corruption"]) == {"gaussian_noise"}
        assert 0 <= found["corruption"]["gaussian_noise"]["ridge"]["value"] <= 1
        assert found["images"] == 24
    assert results["rows"]["pixels"]["robustness"]["clean"]["ridge"]["value"] > 0.5
    assert "corrupted" in markdown_table(results)
