"""Checkpoints of frameworks that train encoders of others: solo-learn's and lightly's, opened down to the encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pretrain.encoders.heads import dino_heads
from pretrain.encoders.layouts import CheckpointState, Imported, recognised
from pretrain.encoders.unwrapped import State

#: Widths of the ViTs of solo-learn's MAE that have 12 heads, where others have 3 and 6.
SOLO_MAE_WIDTHS = (192, 384)


@dataclass(frozen=True)
class Envelope:
    """Where a framework's modules have the encoder.

    encoder: by side, the first words of its keys, the first of which are looked for first; "": it has none, as exports.
    heads: by side, those of DINO's heads, and what comes in their place.
    """

    title: str
    encoder: Mapping[str, tuple[str, ...]]
    heads: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


_TRAIN = "embedding_model.wrapped_model._model."
ENVELOPES = {
    "solo": Envelope(
        "solo-learn",
        {"teacher": ("momentum_backbone.",), "student": ("backbone.", "encoder.")},
        {"teacher": {"momentum_head.": "head."}, "student": {"head.": "head."}},
    ),
    "lightly": Envelope(
        "lightly",
        {
            "teacher": (f"teacher_{_TRAIN}", "teacher_backbone.vit.", "teacher_backbone.", "backbone_momentum."),
            "student": (
                f"student_{_TRAIN}", _TRAIN, "wrapped_model._model.", "student_backbone.vit.", "student_backbone.",
                "backbone.vit.", "backbone.", "",
            ),
        },
        {
            side: {f"{side}_head.dino_head.": "head.", f"{side}_head.ibot_head.": "patch_head.",
                   f"{side}_projection_head.": "head.", f"{side}_head.": "head."}
            for side in ("teacher", "student")
        },
    ),
}  # fmt: skip


def opened(name: str, state: CheckpointState) -> tuple[str, State]:
    """Keep of `state` the encoder that `envelope` holds; returns the layout of its own keys, and heads of DINO.

    A decoder of MAE stays beside the encoder, under the names of MAE's authors.
    """
    envelope = ENVELOPES[name]
    own, side = _encoder_of(envelope, state)
    heads: State = {}
    for theirs, ours in envelope.heads[side].items():
        taken = state.take(theirs) if any(".last_layer." in key for key in state.tensors) else {}
        heads |= {f"{ours}{key.removeprefix(theirs)}": value for key, value in taken.items()}
    heads = dino_heads(heads, state.left)
    decoder: State = {}
    if any(key.startswith("decoder.decoder_blocks.") for key in state.tensors):
        decoder = {key.removeprefix("decoder."): value for key, value in state.take("decoder.").items()}
    if own:
        state.keep(own, f"of {envelope.title}'s method around the encoder, or of its other side")
    state.tensors |= decoder
    if decoder:
        width = state.get("patch_embed.proj.weight").shape[0]
        if name == "solo" and width in SOLO_MAE_WIDTHS:
            state.told, state.told_by = {**state.told, "heads": 12}, "solo-learn's MAE has"
        return "mae", heads
    return next(iter(recognised(state)), "timm"), heads


def _encoder_of(envelope: Envelope, state: CheckpointState) -> tuple[str, str]:
    """The first words of the encoder's keys, and the side it is of."""

    def found(side: str) -> str | None:
        words = envelope.encoder[side]
        return next((word for word in words if any(key.startswith(word) for key in state.tensors)), None)

    own = found(state.which)
    if own is not None:
        return own, state.which
    other = "student" if state.which == "teacher" else "teacher"
    own = found(other)
    if own is None:
        tried = ", ".join(word for words in envelope.encoder.values() for word in words if word)
        near = ", ".join(list(state.tensors)[:6])
        raise ValueError(f"no key begins with {tried} as in {envelope.title}'s checkpoints, but with {near}")
    if own:
        state.notes.append(f"it has no {state.which} beside the {other}: {own[:-1]} is taken")
    return own, other


def named(imported: Imported, heads: State, title: str) -> Imported:
    """The encoder as of the method that its heads tell."""
    imported.method |= heads
    if heads:
        imported.method_name = "dino"
    elif imported.method_name == "timm":
        imported.method_name = title
    return imported
