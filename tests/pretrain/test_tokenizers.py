"""What masked modelling predicts and the tokenizers that give codes: against slow loops from the papers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_train import column, run_all
from tiny import build, config_data, random_batch
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipelines.rng import Purpose, Stream, permutation
from pretrain.checkpoints.folder import FORM, ResumeState, check_resume, read_state
from pretrain.config.load import ConfigError, check_sources, parse_config
from pretrain.diagnostics.alarms import Alarms, Moment
from pretrain.diagnostics.collapse import collapse_rules
from pretrain.encoder_folder import find_encoder
from pretrain.encoders.load import load_any
from pretrain.encoders.patches import patchify
from pretrain.engines.schedules import Timeline
from pretrain.methods.dvae.method import gumbel_noise
from pretrain.methods.dvae.network import divergence_to_uniform, logit_laplace, map_pixels, unmap_pixels
from pretrain.methods.mim.hog import oriented_gradients
from pretrain.methods.mim.method import reduce_mask_counts
from pretrain.methods.vqkd import codebook
from pretrain.methods.vqkd.codebook import Codebook, nearest, spherical_kmeans
from pretrain.methods.vqkd.config import VqkdConfig
from pretrain.tokenizers.card import find_tokenizer, read_card
from pretrain.tokenizers.saved import load_tokenizer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(count: int, dim: int = 4, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=generator(seed)), dim=-1)


def method_of(name: str, shards: Path, tmp_path: Path, family: str = "vit", **changes: Any) -> tuple[Any, Any]:
    data = config_data(name, family, shards, tmp_path)
    data["method"] |= changes
    config = parse_config(data)
    return build(config), config


# the codebook


def test_nearest_is_the_most_similar_in_pieces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vectors = unit(50), unit(7, seed=1)
    slow = [max(range(7), key=lambda k: float(token @ vectors[k])) for token in tokens]
    assert nearest(tokens, vectors).tolist() == slow
    monkeypatch.setattr(codebook, "_SIMILARITIES_AT_ONCE", 30)
    assert nearest(tokens, vectors).tolist() == slow


def test_kmeans_is_the_slow_one() -> None:
    tokens = unit(60)
    centres = tokens[torch.randperm(60, generator=generator(3))[:5]].tolist()
    for _ in range(4):
        members: list[list[list[float]]] = [[] for _ in range(5)]
        for token in tokens.tolist():
            closeness = [sum(a * b for a, b in zip(token, centre, strict=True)) for centre in centres]
            members[closeness.index(max(closeness))].append(token)
        for k, group in enumerate(members):
            if group:
                total = [sum(values) for values in zip(*group, strict=True)]
                length = math.sqrt(sum(value * value for value in total))
                centres[k] = [value / length for value in total]
    torch.testing.assert_close(spherical_kmeans(tokens, 5, 4, seed=3), torch.tensor(centres))


def test_kmeans_with_fewer_tokens_than_clusters_has_them_all() -> None:
    tokens = unit(3)
    centres = spherical_kmeans(tokens, 8, 5, seed=0)
    torch.testing.assert_close(centres.norm(dim=-1), torch.ones(8))
    torch.testing.assert_close(centres[nearest(tokens, centres)], tokens)


def book(**changes: Any) -> Codebook:
    torch.manual_seed(0)
    return Codebook(VqkdConfig(teacher="", vocab_size=6, code_dim=4, **changes)).train()


@pytest.mark.parametrize("parts", [1, 3])
def test_the_codebook_moves_once_a_step_to_what_the_paper_says(parts: int) -> None:
    codes = book(momentum=0.9, restart_below=0)
    before, tokens = codes.vectors.clone(), unit(12, seed=5)
    for part in tokens.chunk(parts):
        codes(part)
        assert torch.equal(codes.vectors, before)
    codes.update(0)
    chosen = nearest(tokens, before).tolist()
    for k in range(6):
        mine = [token for token, code in zip(tokens, chosen, strict=True) if code == k]
        expected = before[k]
        if mine:
            mean = sum(mine[1:], mine[0]) / len(mine)
            expected = 0.9 * before[k] + 0.1 * mean / mean.norm()
            expected = expected / expected.norm()
        torch.testing.assert_close(codes.vectors[k], expected)
        assert float(codes.shares[k]) == pytest.approx(0.9 / 6 + 0.1 * len(mine) / 12)
    shares = [chosen.count(k) / 12 for k in range(6) if k in chosen]
    assert codes.values()["codes_used"] == pytest.approx(len(shares) / 6)
    entropy = -sum(share * math.log(share) for share in shares)
    assert codes.values()["code_perplexity"] == pytest.approx(math.exp(entropy))


@pytest.mark.parametrize("parts", [1, 3])
def test_dead_codes_are_put_on_tokens_of_the_batch(parts: int) -> None:
    codes = book(momentum=0.5, restart_below=0.3)
    # two of six codes get everything, so the others halve their share each step: dead after two
    tokens = torch.cat([codes.vectors[:1]] * 6 + [codes.vectors[1:2]] * 6) + 0.01 * unit(12)
    tokens = F.normalize(tokens, dim=-1)
    dead = []
    for step in range(3):
        for part in tokens.chunk(parts):
            codes(part)
        dead.append(codes.vectors[2:].clone())
        codes.update(step)
    assert torch.equal(dead[0], dead[1])
    drawn = permutation(Stream(0, Purpose.CODES, 1), 12)[:4]  # different tokens, the same however the batch is split
    assert torch.equal(dead[2], tokens[drawn])
    assert codes.values()["codes_used"] > 2 / 6


def test_by_default_dead_codes_stay_where_they_are() -> None:
    """As in the authors' code: what no token chose is neither moved nor restarted."""
    codes = book(momentum=0.5)
    before = codes.vectors.clone()
    for step in range(30):  # a share of 0.5 ** 30 / 6
        codes(codes.vectors[:1].repeat(12, 1))
        codes.update(step)
    assert torch.equal(codes.vectors[1:], before[1:])
    assert codes.values()["codes_alive"] == pytest.approx(1 / 6)


def test_a_codebook_in_evaluation_learns_nothing() -> None:
    codes = book().eval()
    before = {name: value.clone() for name, value in codes.state_dict().items()}
    codes(unit(9))
    assert all(torch.equal(value, before[name]) for name, value in codes.state_dict().items())
    assert not codes.usage.counts.any()


# VQ-KD


def test_vqkd_loss_and_gradient_are_the_papers(shards: Path, tmp_path: Path) -> None:
    method, config = method_of("vqkd", shards, tmp_path)
    batch = random_batch(config)
    crops = batch["global_crops"][:, 0]
    loaded = load_any(str(shards / "teacher"))
    teacher = loaded.encoder((crops / 255 - 0.4) / 0.3).tokens
    teacher = F.interpolate(teacher.transpose(1, 2).unflatten(2, (4, 4)), size=(8, 8), mode="bilinear")
    teacher = teacher.flatten(2).transpose(1, 2).detach()
    vectors = method.vectors(crops)
    vectors.retain_grad()
    method.vectors = lambda _: vectors
    values = method(batch, 0)
    book_vectors = method.codebook.vectors
    distance, commitment = 0.0, 0.0
    for image in range(4):
        for place in range(64):
            vector = vectors[image, place].detach()
            code = book_vectors[int((book_vectors @ vector).argmax())]
            commitment += float((vector - code).square().mean()) / 256
    codes = book_vectors[(vectors.detach() @ book_vectors.T).argmax(dim=-1)].requires_grad_()
    predicted = method.decoder(codes)
    for image in range(4):
        for place in range(64):
            a, b = predicted[image, place], teacher[image, place]
            distance += (1 - a @ b / a.norm() / b.norm()) / 256
    assert float(values["loss"].detach()) == pytest.approx(float(distance.detach()) + commitment, rel=1e-5)
    values["loss"].backward()
    distance.backward()
    straight = codes.grad + 2 * (vectors.detach() - codes.detach()) / vectors.numel()
    torch.testing.assert_close(vectors.grad, straight, atol=1e-7, rtol=1e-4)


def test_the_teacher_is_in_no_checkpoint_and_in_no_optimizer(shards: Path, tmp_path: Path) -> None:
    method, config = method_of("vqkd", shards, tmp_path)
    assert not any("teacher" in name for name in method.state_dict())
    assert not any("teacher" in name for name, _ in method.named_parameters())
    method.train()
    assert not method.teacher.network.training
    method(random_batch(config), 0)["loss"].backward()
    assert all(parameter.grad is None for parameter in method.teacher.network.parameters())


def test_vectors_are_fp32_under_autocast(shards: Path, tmp_path: Path) -> None:
    method, config = method_of("vqkd", shards, tmp_path)
    crops = random_batch(config)["global_crops"][:, 0]
    with torch.autocast("cpu", torch.bfloat16):
        tokens = method.encoder(method.normalise(crops)).tokens
        found = method.vectors(crops)
    torch.testing.assert_close(found, F.normalize(method.head(tokens.float()), dim=-1))


def test_a_run_goes_on_with_the_teacher_it_began_with(shards: Path, tmp_path: Path) -> None:
    """A run that is named as the teacher may have gone on meanwhile."""
    folder = tmp_path / "teacher"
    shutil.copytree(shards / "teacher", folder)
    began, _ = method_of("vqkd", shards, tmp_path, teacher=str(folder))
    again, _ = method_of("vqkd", shards, tmp_path, teacher=str(folder))
    assert began.pinned() == again.pinned()
    weights = load_file(folder / "model.safetensors")
    weights["norm.bias"] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    changed, _ = method_of("vqkd", shards, tmp_path, teacher=str(folder))
    state = ResumeState(step=4, world_size=1, zero_stage=0, order=began.pinned(), form=FORM)
    check_resume(folder, state, again.pinned())
    with pytest.raises(ConfigError, match=r"reached with method\.teacher = "):
        check_resume(folder, state, changed.pinned())


def test_vqkd_starts_from_clusters_of_the_whole_first_batch(shards: Path, tmp_path: Path) -> None:
    method, config = method_of("vqkd", shards, tmp_path)
    whole = random_batch(config, size=8)
    halves: list[Any] = [
        {key: value[rows] if value is not None else None for key, value in whole.items()}
        for rows in (slice(0, 4), slice(4, 8))
    ]
    method.train().before_step(0, halves, lambda batch: method(batch, 0))
    assert method.training
    assert not method.codebook.sums.any()
    tokens = method.eval().vectors(whole["global_crops"][:, 0]).detach().flatten(0, 1)
    torch.testing.assert_close(method.codebook.vectors, spherical_kmeans(tokens, 16, 10, seed=0))
    started = method.codebook.vectors.clone()
    method.before_step(1, [random_batch(config, seed=3)], pytest.fail)
    assert torch.equal(method.codebook.vectors, started)


def test_vqkd_runs_resume_to_the_last_bit_and_their_codes_can_be_learned(shards: Path, tmp_path: Path) -> None:
    whole = config_data("vqkd", "vit", shards, tmp_path, train={"steps": 12}) | {"name": "whole"}
    parts = json.loads(json.dumps(whole)) | {"name": "parts"}
    run_all([whole, parts], 1, tmp_path)
    checkpoints = tmp_path / "parts" / "checkpoints"
    (checkpoints / "step-00000012" / "state.json").unlink()  # a run that was killed after step 8
    data = config_data("beitv2", "vit", shards, tmp_path)
    data["method"]["tokenizer"] = str(tmp_path / "whole")
    run_all([parts, data], 1, tmp_path)
    for name in ("loss", "commitment", "codes_used", "code_perplexity", "codes_alive"):
        assert column(parts, name) == column(whole, name), name
    folders = [tmp_path / name / "tokenizer" / "model.safetensors" for name in ("whole", "parts")]
    assert folders[0].read_bytes() == folders[1].read_bytes()
    assert find_tokenizer(tmp_path / "whole") == tmp_path / "whole" / "tokenizer"
    assert find_tokenizer(checkpoints / "step-00000008") == checkpoints / "step-00000008" / "tokenizer"
    with pytest.raises(FileNotFoundError, match=r"holds a tokenizer, .* no encoder to load or probe"):
        find_encoder(tmp_path / "whole")

    tokenizer, card = load_tokenizer(tmp_path / "whole" / "tokenizer")
    assert (card.kind, card.vocab_size, card.stride, card.step) == ("vqkd", 16, 4, 12)
    config = parse_config(data)
    codes = tokenizer(random_batch(config)["target_crops"])
    assert codes.shape == (4, 8, 8)
    assert codes.dtype == torch.int64
    assert column(data, "loss")[-1] > column(data, "aggregation_loss")[-1] > 0

    path = tmp_path / "beitv2-vit" / "checkpoints" / "step-00000008"
    state = read_state(path)
    check_resume(path, state, build(config).pinned())
    folders[0].write_bytes((checkpoints / "step-00000008" / "tokenizer" / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"reached with method\.tokenizer = "):  # which would speak another language
        check_resume(path, state, build(config).pinned())


@pytest.mark.slow  # methods on ranks, and a tokenizer's state, are tested by default
def test_two_ranks_agree_on_codes_and_learn_what_one_does(shards: Path, tmp_path: Path) -> None:
    """The k-means start, the codebook and its restarts, the dVAE's noise and average, the mask counts."""
    runs: dict[int, list[dict[str, Any]]] = {}
    for ranks, stage in ((1, 0), (2, 3)):
        runs[ranks] = []
        for name in ("vqkd", "dvae", "beitv2"):
            data = config_data(
                name,
                "vit",
                shards,
                tmp_path / str(ranks),
                train={"steps": 8, "batch_size": 8, "grad_accum_steps": ranks},
                engine={"zero_stage": stage},
                checkpoint={"every_steps": 100},
            )
            runs[ranks].append(data)
        run_all(runs[ranks], ranks, tmp_path)
    for alone, together in zip(runs[1], runs[2], strict=True):
        # the dVAE's loss, a log-density, passes zero: there a relative bound alone asks for more than fp32 has
        assert column(together, "loss") == pytest.approx(column(alone, "loss"), rel=2e-5, abs=1e-4), alone["name"]
        assert len(set(column(alone, "loss"))) == 8
        if alone["method"]["name"] != "mim":
            one_code = 1 / alone["method"]["vocab_size"]  # which two orders of summing may tell apart
            assert column(together, "codes_used") == pytest.approx(column(alone, "codes_used"), abs=1.01 * one_code)
            states = [
                load_file(tmp_path / ranks / alone["name"] / "tokenizer" / "model.safetensors") for ranks in ("1", "2")
            ]
            for name, value in states[0].items():
                torch.testing.assert_close(states[1][name], value, atol=2e-4, rtol=1e-2)
    restarted = column(runs[1][0], "codes_used")
    assert max(restarted) > min(restarted)


# the dVAE


def test_logit_laplace_is_a_density() -> None:
    pixels = torch.linspace(1e-5, 1 - 1e-5, 200_001, dtype=torch.float64)
    for location, log_scale in ((0.0, 0.0), (1.2, -1.0), (-0.7, 0.5)):
        place = torch.full_like(pixels, location), torch.full_like(pixels, log_scale)
        density = torch.exp(-logit_laplace(pixels, *place))
        assert float(torch.trapezoid(density, pixels)) == pytest.approx(1, abs=2e-3)
    x, scale = 0.3, math.exp(-0.4)
    slow = math.log(2 * scale * x * (1 - x)) + abs(math.log(x / (1 - x)) - 0.2) / scale
    assert float(logit_laplace(torch.tensor(x), torch.tensor(0.2), torch.tensor(-0.4))) == pytest.approx(slow)


def test_pixels_map_to_a_tenth_from_both_ends_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    mapped = map_pixels(pixels)
    assert (float(mapped[0]), float(mapped[-1])) == (pytest.approx(0.1), pytest.approx(0.9))
    assert torch.equal((unmap_pixels(mapped) * 255).round().byte(), pixels)
    assert torch.equal(map_pixels(pixels.to(torch.uint16) * 257), mapped)


def test_dvae_loss_is_the_papers(shards: Path, tmp_path: Path) -> None:
    """Both terms summed over an image and divided by its pixel values (Ramesh et al. 2021, A.2)."""
    method, config = method_of("dvae", shards, tmp_path, kl_weight=6.6, kl_share=0.1, temperature_share=0.5)
    batch, step = random_batch(config), 5
    values = method(batch, step)
    mapped = map_pixels(batch["global_crops"][:, 0])
    logits = method.network(mapped)
    assert logits.shape == (4, 32, 8, 8)
    noise = gumbel_noise(logits, batch["rows"], 0, step)
    temperature = 0.0625 + (1 - 0.0625) * 0.5 * (1 + math.cos(math.pi * step / 50))
    location, log_scale = method.decoder(((logits + noise) / temperature).softmax(dim=1))
    likelihood = float(logit_laplace(mapped, location, log_scale).sum().detach())
    divergence = 0.0
    for image in range(4):
        for row in range(8):
            for place in range(8):
                shares = logits[image, :, row, place].softmax(dim=0).tolist()
                divergence += sum(q * math.log(q * 32) for q in shares)
    expected = (likelihood + 6.6 * step / 10 * divergence) / (4 * 3 * 32 * 32)
    assert float(values["loss"].detach()) == pytest.approx(expected, rel=1e-5)
    assert float(values["divergence"]) == pytest.approx(divergence / 256, rel=1e-4)
    assert float(divergence_to_uniform(torch.zeros(1, 32, 2, 2))) == pytest.approx(0, abs=1e-6)
    later = method.schedules(50)
    assert (later["temperature"], later["kl_weight"]) == (0.0625, 6.6)


def test_dvae_noise_belongs_to_the_row_and_not_to_the_micro_batch() -> None:
    rows = torch.tensor([4, 9, 2])
    noise = gumbel_noise(torch.zeros(3, 50, 8, 8), rows, seed=1, step=7)
    again = torch.cat([gumbel_noise(torch.zeros(1, 50, 8, 8), row[None], seed=1, step=7) for row in rows])
    assert torch.equal(noise, again)
    assert not torch.equal(noise, gumbel_noise(noise, rows, seed=1, step=8))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.05)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.1)


@pytest.mark.parametrize("start", ["published", "spread"])
def test_dvae_starts_as_published_or_with_codes_that_differ_between_places(
    start: str, shards: Path, tmp_path: Path
) -> None:
    method, config = method_of("dvae", shards, tmp_path, start=start)
    halves = [random_batch(config, seed=seed) for seed in (0, 1)]
    method.train().before_step(0, halves, lambda batch: method(batch, 0))
    crops = torch.cat([batch["global_crops"][:, 0] for batch in halves])
    logits = method.network(map_pixels(crops)).detach()
    common = logits.mean(dim=(0, 2, 3))
    assert torch.equal(method.average.shift, method.network.shift)
    assert not method.usage.counts.any()
    if start == "published":
        assert not method.network.shift.any()
        assert float(method.network.layers[0].bias.detach().abs().max()) == 0
        return
    torch.testing.assert_close(common, torch.zeros(32), atol=1e-4, rtol=0)
    deviation = float(logits.std())
    assert 1 < deviation < 10
    shift = method.network.shift.clone()
    method.before_step(1, halves, pytest.fail)
    assert torch.equal(method.network.shift, shift)


def test_dvae_saves_the_slow_average(shards: Path, tmp_path: Path) -> None:
    method, config = method_of("dvae", shards, tmp_path)
    method.train()
    start = [parameter.clone() for parameter in method.average.parameters()]
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(1)
    method(random_batch(config), 0)
    method.after_step(0)
    for before, now in zip(start, method.average.parameters(), strict=True):
        torch.testing.assert_close(now, before + 0.5)
    codes = method.average(map_pixels(random_batch(config)["global_crops"][:, 0])).argmax(dim=1)
    assert torch.equal(method.tokenizer()(random_batch(config)["global_crops"][:, 0]), codes)
    live = method.network(map_pixels(random_batch(config)["global_crops"][:, 0])).argmax(dim=1)
    assert method.schedules(0)["codes_used"] == pytest.approx(len(live.unique()) / 32)


# targets


def test_codes_loss_is_the_papers_over_all_micro_batches(shards: Path, tmp_path: Path) -> None:
    method, config = method_of("codes", shards, tmp_path)
    method.eval()
    batch = random_batch(config)
    codes = load_tokenizer(shards / "tokenizer")[0](batch["target_crops"])
    scores = method.predict(method.normalise(batch["global_crops"][:, 0]), batch)
    total, right, count = 0.0, 0, 0
    for image in range(4):
        for row in range(8):
            for place in range(8):
                if batch["token_mask"][image, row, place]:
                    exponents = [math.exp(score) for score in scores[image, row, place].tolist()]
                    code = int(codes[image, row, place])
                    total -= math.log(exponents[code] / sum(exponents))
                    right += exponents.index(max(exponents)) == code
                    count += 1
    values = method(batch, 0)
    assert float(values["loss"].detach()) == pytest.approx(total / count, rel=1e-5)
    assert float(values["accuracy"]) == pytest.approx(right / count, rel=1e-5)
    assert len(codes.unique()) > 1
    ones: list[Any] = [
        {key: value[row : row + 1] if value is not None else None for key, value in batch.items()} for row in range(4)
    ]
    reduce_mask_counts(ones)
    for name, whole in values.items():
        mean = sum(float(method(one, 0)[name].detach()) for one in ones) / 4
        assert mean == pytest.approx(float(whole.detach()), rel=1e-5)


def test_aggregation_joins_the_last_class_token_with_earlier_patches(shards: Path, tmp_path: Path) -> None:
    method, config = method_of("beitv2", shards, tmp_path)
    method.eval()
    batch = random_batch(config)
    images = method.normalise(batch["global_crops"][:, 0])
    states: list[torch.Tensor] = []
    vit = method.encoder.vit
    for block in vit.blocks:
        block.register_forward_hook(lambda *call: states.append(call[2]))
    main, aggregated = method.cells(images, batch)
    first, last = states
    joined = torch.cat([last[:, :1], first[:, 1:]], dim=1)
    for block in method.aggregation.blocks:
        joined = block(joined)
    torch.testing.assert_close(aggregated.flatten(1, 2), vit.norm(joined)[:, 1:])
    torch.testing.assert_close(main.flatten(1, 2), vit.norm(last)[:, 1:])
    values = method(batch, 0)
    wanted = method.target.wanted(images, batch)
    second = F.cross_entropy(method.head(aggregated[batch["token_mask"]]), wanted)
    assert float(values["aggregation_loss"]) == pytest.approx(float(second.detach()), rel=1e-5)
    own = F.cross_entropy(method.head(main[batch["token_mask"]]), wanted)
    assert float(values["loss"].detach()) == pytest.approx(float((own + second).detach()), rel=1e-5)


def test_hog_is_the_slow_one() -> None:
    pixels = torch.randint(0, 256, (1, 2, 16, 24), generator=generator(), dtype=torch.uint8)
    found = oriented_gradients(pixels)
    assert found.shape == (1, 2, 2, 3, 9)
    for channel in range(2):
        image = pixels[0, channel].tolist()
        for row in range(2):
            for place in range(3):
                histogram = [0.0] * 9
                for y in range(row * 8, row * 8 + 8):
                    for x in range(place * 8, place * 8 + 8):
                        down = image[y + 1][x] - image[y - 1][x] if 0 < y < 15 else 0
                        across = image[y][x + 1] - image[y][x - 1] if 0 < x < 23 else 0
                        angle = math.degrees(math.atan2(down, across)) % 180
                        histogram[int(angle // 20) % 9] += math.hypot(down, across)
                length = math.sqrt(sum(value**2 for value in histogram))
                expected = [value / length for value in histogram]
                assert found[0, channel, row, place].tolist() == pytest.approx(expected, abs=1e-5)


def test_hog_makes_no_tensors_of_all_orientations_of_all_pixels() -> None:
    """Nine 64-bit integers and nine lengths of each pixel of 16 images of 224 px were 466 MB at once."""
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Sizes():
        oriented_gradients(images)
    assert largest <= 8 * images.numel()  # the orientations in double


def test_hog_is_scikit_images() -> None:
    feature = pytest.importorskip("skimage.feature")
    pixels = torch.randint(0, 256, (1, 1, 32, 32), generator=generator(), dtype=torch.uint8)
    theirs = feature.hog(
        pixels[0, 0].numpy().astype(float),
        orientations=9,
        pixels_per_cell=(8, 8),
        cells_per_block=(1, 1),
        block_norm="L2",
        feature_vector=False,
    )
    torch.testing.assert_close(
        oriented_gradients(pixels)[0, 0], torch.from_numpy(theirs[:, :, 0, 0]).float(), atol=1e-4, rtol=1e-4
    )


def test_a_flat_image_has_no_gradients_and_no_nans() -> None:
    assert not oriented_gradients(torch.full((1, 3, 16, 16), 7, dtype=torch.uint8)).any()


@pytest.mark.parametrize("name", ["hog", "normalised_pixels"])
def test_squared_errors_are_over_the_hidden_units_only(name: str, shards: Path, tmp_path: Path) -> None:
    method, config = method_of(name, shards, tmp_path)
    batch = random_batch(config)
    images = method.normalise(batch["global_crops"][:, 0])
    predicted, cell = method.predict(images, batch), method.target.cell
    histograms = oriented_gradients(batch["global_crops"][:, 0])
    total, count = 0.0, 0
    for image in range(4):
        for row in range(32 // cell):
            for place in range(32 // cell):
                if not batch["token_mask"][image, row, place]:
                    continue
                if name == "hog":
                    values = histograms[image, :, row, place].flatten()
                else:
                    patch = images[image, :, row * cell : (row + 1) * cell, place * cell : (place + 1) * cell]
                    values = patchify(patch[None], cell)[0, 0]
                    values = (values - values.mean()) / (values.var() + 1e-6).sqrt()
                total += float((predicted[image, row, place] - values).square().mean().detach())
                count += 1
    assert count < batch["token_mask"].numel()
    assert float(method(batch, 0)["loss"].detach()) == pytest.approx(total / count, rel=1e-5)


def test_tokens_are_brought_to_the_cells(shards: Path, tmp_path: Path) -> None:
    mask = {"kind": "random", "ratio": 0.5, "unit": 2}
    method, config = method_of("normalised_pixels", shards, tmp_path, family="swin", mask=mask)
    assert (method.encoder.stride, method.target.cell) == (4, 2)
    assert method.finer.weight.shape == (4 * method.encoder.dim, method.encoder.dim)
    tokens = torch.randn(2, 3, 5, method.encoder.dim, generator=generator())
    cells = method._at_cells(tokens)
    assert cells.shape == (2, 6, 10, method.encoder.dim)
    parts = method.finer(tokens).unflatten(-1, (2, 2, -1))
    torch.testing.assert_close(cells[1, 3, 8], parts[1, 1, 4, 1, 0])
    assert float(method(random_batch(config), 0)["loss"].detach()) > 0

    method, _ = method_of("hog", shards, tmp_path)  # units of 8 px, tokens of 4
    tokens = torch.randn(2, 4, 6, method.encoder.dim, generator=generator())
    cells = method._at_cells(tokens)
    assert cells.shape == (2, 2, 3, method.encoder.dim)
    torch.testing.assert_close(cells[1, 1, 2], tokens[1, 2:4, 4:6].flatten(0, 1).mean(dim=0))


# what goes with what


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("codes", {"views": {"target_crop": None}}, "needs views.target_crop"),
        ("hog", {"views": {"target_crop": {"size": 32}}}, "reads no views.target_crop"),
        ("codes", {"method": {"tokenizer": None}}, "needs the run of a tokenizer"),
        ("hog", {"method": {"mask": {"unit": 4}}}, "multiple of 8"),
        ("beitv2", {"encoder": {"class_token": False}}, "vit has none as it is set"),
        ("beitv2", {"method": {"aggregation": {"layer": 2}}}, "below the last of the 2 blocks"),
        ("hog", {"method": {"aggregation": {"layer": 1}}}, "head for target codes"),
        ("dvae", {"encoder": {"family": "vit"}}, "set encoder=null"),
        ("dvae", {"optim": {"layer_decay": 0.9}}, "set optim.layer_decay=1.0"),
        ("dvae", {"views": {"global_crops": [{"size": 30}]}}, "dvae's stride is 4"),
        ("vqkd", {"encoder": None}, "vqkd needs an encoder"),
        ("vqkd", {"views": {"local_crops": {"size": 16}}}, "sees no local crops"),
    ],
)
def test_refusals(name: str, changes: dict[str, Any], says: str, shards: Path, tmp_path: Path) -> None:
    data = config_data(name, "vit", shards, tmp_path)
    for section, values in changes.items():
        data[section] = values if values is None or data[section] is None else {**data[section], **values}
    with pytest.raises(ConfigError) as caught:
        parse_config(data)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "section", "changes", "says"),
    [
        ("codes", "method", {"tokenizer": "/nowhere"}, "method.tokenizer: /nowhere is not a folder"),
        ("codes", "views", {"target_crop": {"size": 16}}, "set views.target_crop.size=32"),
        ("codes", "data", {"channels": 1}, "reads images of 3 channels"),
        ("vqkd", "method", {"teacher": "/nowhere"}, "method.teacher: /nowhere is not a folder"),
        ("vqkd", "method", {"teacher": "timm:vit_tinny"}, "method.teacher: timm"),
        ("vqkd", "method", {"teacher": "timm:crossvit_tiny_240"}, "does not run on images of 32x32 px"),
        ("vqkd", "views", {"global_crops": [{"size": 36}]}, "its tokens are 8 px, which do not divide"),
        ("vqkd", "data", {"channels": 1}, "reads images of 3 channels"),
    ],
)
def test_other_runs_are_looked_at_before_anything_starts(
    name: str, section: str, changes: dict[str, Any], says: str, shards: Path, tmp_path: Path
) -> None:
    data = config_data(name, "vit", shards, tmp_path)
    check_sources(parse_config(data))
    data[section] |= changes
    with pytest.raises(ConfigError) as caught:
        check_sources(parse_config(data))
    assert says in str(caught.value)


def test_a_folder_without_a_tokenizer_says_what_it_holds(shards: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*config.json, model.safetensors"):
        find_tokenizer(shards / "teacher")
    assert read_card(shards / "tokenizer").vocab_size == 16


@pytest.mark.parametrize("method", ["dvae", "vqkd"])
def test_a_dead_codebook_raises_an_alarm(method: str, shards: Path, tmp_path: Path) -> None:
    config = parse_config(config_data(method, "vit", shards, tmp_path))
    cases = ((0.02, 2.0), (0.02, 0.5), (0.6, 2.0))
    rules = [rule for rule in collapse_rules(config, Timeline(100, 10.0)) if rule.name == "dead_codes"]
    said = [
        [change.text for change in Alarms(rules).look(Moment(80, epoch, {"codes_used": used}))] for used, epoch in cases
    ]
    assert [len(alarm) for alarm in said] == [1, 0, 0]
    assert "only 2.0% of the codes" in said[0][0]
