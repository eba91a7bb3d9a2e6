"""CLIP's image encoders: OpenAI's and OpenCLIP's names, transformers', and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hub_models import SHAPE, everything, images, random_model
from safetensors.torch import save_file
from torch import Tensor, nn

from pretrain.encoders.saved import load_encoder
from pretrain.interop.export import export_encoder
from pretrain.interop.official import describe, import_checkpoint

transformers = pytest.importorskip("transformers")


class Tower(nn.Module):
    """CLIP's image encoder as OpenAI's code names its parts, in plain steps (Radford et al. 2021)."""

    def __init__(self, width: int = 64, heads: int = 1, depth: int = 2, patch: int = 8, grid: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(nn.Module() for _ in range(depth))
        for block in self.transformer.resblocks:
            block.ln_1, block.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            block.attn = nn.MultiheadAttention(width, heads, batch_first=True)
            block.mlp = nn.Module()
            block.mlp.c_fc, block.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, 10))

    def forward(self, pixels: Tensor, quick: bool) -> Tensor:
        """Images to tokens before the projection."""
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            y = block.ln_1(x)
            x = x + block.attn(y, y, y, need_weights=False)[0]
            hidden = block.mlp.c_fc(block.ln_2(x))
            hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else nn.functional.gelu(hidden)
            x = x + block.mlp.c_proj(hidden)
        return self.ln_post(x)


def whole() -> tuple[Tower, dict[str, Tensor]]:
    """A tower, and a checkpoint with it and a text encoder."""
    torch.manual_seed(0)
    tower = Tower().eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    state = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    text = {"token_embedding.weight": torch.randn(9, 8), "transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    sizes = {name: torch.tensor(8) for name in ("input_resolution", "context_length", "vocab_size")}
    return tower, {**state, **text, **sizes, "logit_scale": torch.tensor(4.6)}


@torch.no_grad()
@pytest.mark.parametrize(("layout", "mlp"), [("clip", "quick_gelu"), ("openclip", "gelu")])
def test_openais_names(layout: str, mlp: str, tmp_path: Path) -> None:
    tower, state = whole()
    torch.save(state, tmp_path / "clip.pt")
    found = import_checkpoint(tmp_path / "clip.pt", layout, tmp_path / "out")
    pixels = images(32, 32)
    theirs = tower(pixels, quick=mlp == "quick_gelu")
    torch.testing.assert_close(everything(tmp_path / "out", pixels), theirs, rtol=0, atol=1e-5)
    ours = load_encoder(tmp_path / "out")[0](pixels).pooled @ found.method["projection"]
    torch.testing.assert_close(ours, theirs[:, 0] @ tower.proj, rtol=0, atol=1e-4)
    assert set(found.left) == {key for key in state if not key.startswith("visual.")}
    text = describe(found, tmp_path / "out")
    assert f"mlp={mlp} is guessed" in text
    assert "minus mean (0.48145466, 0.4578275, 0.40821073)" in text
    other = import_checkpoint(tmp_path / "clip.pt", layout, tmp_path / "other", overrides=("mlp=gelu",))
    assert other.encoder.mlp == "gelu"
    with pytest.raises(ValueError, match="may be of several layouts; name one: --as clip or --as openclip"):
        import_checkpoint(tmp_path / "clip.pt", None, tmp_path / "again")


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (24, 48)], ids=str)
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_transformers_names(act: str, size: tuple[int, int], tmp_path: Path) -> None:
    vision = {**SHAPE, "hidden_act": act, "projection_dim": 12}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 30}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
    model = random_model(transformers.CLIPModel, config)
    model.save_pretrained(tmp_path / "hub")
    found = import_checkpoint(tmp_path / "hub", "clip", tmp_path / "out")
    assert (found.encoder.mlp, found.encoder.heads, found.encoder.hidden) == (act, 4, 64)
    assert f"mlp={act}, as the config.json beside it tells" in found.notes
    pixels = images(*size)
    theirs = model.vision_model(pixels, interpolate_pos_encoding=True)
    ours = everything(tmp_path / "out", pixels)
    torch.testing.assert_close(ours[:, 1:], model.vision_model.post_layernorm(theirs.last_hidden_state)[:, 1:])
    torch.testing.assert_close(ours[:, 0], theirs.pooler_output, rtol=0, atol=1e-5)
    embedded = model.visual_projection(theirs.pooler_output)
    torch.testing.assert_close(ours[:, 0] @ found.method["projection"], embedded, rtol=0, atol=1e-5)


@torch.no_grad()
def test_open_clips_own_model(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32, "ls_init_value": 0.3}
    text = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    model = random_model(lambda _: open_clip.CLIP(embed_dim=10, vision_cfg=vision, text_cfg=text), None)
    save_file(model.state_dict(), tmp_path / "open_clip.safetensors")
    found = import_checkpoint(tmp_path / "open_clip.safetensors", "openclip", tmp_path / "out", overrides=("heads=4",))
    pixels = images(32, 32)
    ours = load_encoder(tmp_path / "out")[0](pixels).pooled @ found.method["projection"]
    torch.testing.assert_close(ours, model.encode_image(pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["timm", "hf", "safetensors", pytest.param("onnx", marks=pytest.mark.slow)])
def test_an_imported_tower_is_exported(kind: str, tmp_path: Path) -> None:
    _, state = whole()
    torch.save(state, tmp_path / "clip.pt")
    import_checkpoint(tmp_path / "clip.pt", "clip", tmp_path / "in")
    suffix = {"hf": "", "onnx": ".onnx"}.get(kind, ".safetensors")
    assert export_encoder(tmp_path / "in", tmp_path / f"out{suffix}", kind).difference <= 1e-4


def test_half_precision_is_brought_to_float32_and_sizes_stay_whole(tmp_path: Path) -> None:
    _, state = whole()
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    torch.save(half, tmp_path / "clip.pt")
    found = import_checkpoint(tmp_path / "clip.pt", "clip", tmp_path / "out")
    assert "weights in float16 were brought to float32" in found.notes
    assert torch.equal(
        found.weights["blocks.0.mlp.fc1.weight"], half["visual.transformer.resblocks.0.mlp.c_fc.weight"].float()
    )


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("visual.layer1.0.conv1.weight", "is a ResNet; name it timm:resnet50_clip"),
        ("visual.trunk.cls_token", "is a model of timm's: import it with --as timm"),
        ("visual.attn_pool.query", "pools by attention"),
    ],
)
def test_other_image_encoders_are_refused(key: str, message: str, tmp_path: Path) -> None:
    torch.save({key: torch.zeros(1), "logit_scale": torch.tensor(1.0)}, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=message):
        import_checkpoint(tmp_path / "clip.pt", "openclip", tmp_path / "out")


def test_archives_of_torchscript_are_not_read(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="is a TorchScript archive, as OpenAI released CLIP: it holds code"):
        import_checkpoint(tmp_path / "clip.pt", "clip", tmp_path / "out")
