"""A SentencePiece model file as a fast tokenizer with exactly the pieces that the sentencepiece library would give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_core.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

PROBES = ("Hello world", " lead", "two  spaces ", "\n\n a\tb", "é中文 \U0001f642", "don't 12345", "a", " ")
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # SentencePiece.Type


def load(path: Path) -> tuple[Backend, dict[str, str]]:
    """Return the fast tokenizer of a `tokenizer.model` and its named special tokens (`bos_token`, `eos_token`, ...).

    transformers would load such a file without its leading-space rule (mistral) or drop the mark before a text that
    starts with a space, so the conversion is ours and is compared with the sentencepiece library on a few texts.
    Control symbols written in a text become their ids, as everywhere in Hugging Face.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # pyrefly: ignore
    try:
        proto.ParseFromString(path.read_bytes())
        reference: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:
        raise InputError(f"{path}: not a SentencePiece model ({type(error).__name__})") from error
    backend = _convert(proto, path)
    for text in PROBES:
        if backend.encode(text, add_special_tokens=False).ids != reference.encode(text):
            raise InputError(
                f"{path}: this SentencePiece model splits {text!r} in a way its conversion does not; "
                "put its tokenizer.json into the folder"
            )
    ids = {"unk_token": reference.unk_id(), "bos_token": reference.bos_id(), "eos_token": reference.eos_id()}
    ids["pad_token"] = reference.pad_id()
    return backend, {name: reference.id_to_piece(i) for name, i in ids.items() if i >= 0}


def _convert(proto: Any, path: Path) -> Backend:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    pieces = [piece.piece for piece in proto.pieces]
    scores = [piece.score for piece in proto.pieces]
    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))

    byte_fallback = proto.trainer_spec.byte_fallback
    unknown = next((i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN), 0)
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        model = models.BPE(
            vocabulary,
            _merges(vocabulary, scores),
            unk_token=pieces[unknown],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    elif proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        model = models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=unknown, byte_fallback=byte_fallback)
    else:
        raise InputError(f"{path}: only BPE and unigram SentencePiece models are known")

    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(steps)
    tail = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    backend.add_special_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=True)
            for piece in proto.pieces
            if piece.type in (UNKNOWN, CONTROL)
        ]
    )
    backend.add_tokens(
        [AddedToken(piece.piece, normalized=False) for piece in proto.pieces if piece.type == USER_DEFINED]
    )
    return backend


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best-scored result first (SentencePiece's order)."""
    ranked = []
    for piece, i in vocabulary.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        ranked += [(-scores[i], pair) for pair in known]
    ranked.sort(key=lambda item: item[0])
    return [pair for _, pair in ranked]
