"""What the words of a recipe came to when a run began: files change under their names, and `auto` means another thing on
another machine. A checkpoint keeps it, and a resumed run compares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from tbrm.config.model import ModelConfig
from tbrm.config.schema import Config
from tbrm.config.section import ConfigError
from tbrm.policy.lora import CONFIG as ADAPTERS
from tbrm.policy.lora import base_of, has_adapters
from tbrm.registry import GIVEN

_MODEL_FILES = (
    "*.safetensors",
    "*config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.py",
)
_PLACES, _PLACE_BYTES = 64, 2**16


def resolve(config: Config) -> dict[str, str]:
    """By key, and for a model by file: what it is. To be called once the model is loaded: a hub's lies in the cache then."""
    found = {
        "model.precision": str(config.model.resolve_precision()).removeprefix("torch."),
        "rollout.temperature": str(config.rollout.temperature),  # as scores of the reference depend on it
        **{f"model.name/{file}": _digest(path) for file, path in _model_files(config.model)},
    }
    if config.data.trajectories:
        found["data.trajectories"] = _digest(Path(config.data.trajectories))
    if config.task:
        found |= {f"task.{key}": _digest(Path(path)) for key, path in config.task.files().items()}
    return found


def resolve_given(lm: PreTrainedModel) -> dict[str, str]:
    """Of a model that is an object, before it is trained: some of each tensor, as training changes all of it."""
    digest = hashlib.sha256()
    for name, tensor in lm.state_dict().items():
        some = tensor.detach().flatten()[:: max(1, tensor.numel() // _PLACES)]
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + some.to("cpu", torch.float32).numpy().tobytes())
    return {"model.name/weights": digest.hexdigest()}


def is_same_reference(config: Config, was: dict[str, str], now: dict[str, str], *, anyway: bool) -> bool:
    """Whether a resumed run's reference says what it said. Raises ConfigError where anything is another than it `was`, unless
    it is to go on `anyway`. What an earlier version did not keep is not compared."""
    files = {key for key in now if was and key.startswith("model.name/")}
    different = sorted(key for key in was.keys() | files if was.get(key) != now.get(key))
    if different and not anyway:
        listed = "; ".join(_said(key, was.get(key), now.get(key)) for key in different)
        raise ConfigError(
            f"run.dir: {config.run.dir!r} began with something else: {listed}. Put it back as it was, or give --resume-anyway"
        )
    return not any(key.startswith(("model.", "rollout.")) for key in different)


def _said(key: str, was: str | None, now: str | None) -> str:
    if was is None or now is None:
        return f"{key} {'is gone' if now is None else 'was not there'}"
    digests = "/" in key or key.startswith(("data.", "task."))
    return f"{key} is not the file that it was" if digests else f"{key} was {was} and is {now} here (set it to {was})"


def _model_files(config: ModelConfig) -> Iterator[tuple[str, Path]]:
    if config.name in ("tiny", GIVEN):
        return
    folder = Path(config.name)
    if not folder.is_dir():
        folder = Path(snapshot_download(config.name, revision=config.revision, local_files_only=True))
    for path in sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()}):
        yield path.name, path
    if has_adapters(config.name):
        base = base_of(folder, json.loads((folder / ADAPTERS).read_text())["base_model_name_or_path"])
        if Path(base).is_dir():  # a hub's may not be here yet
            yield from ((f"base/{file}", path) for file, path in _model_files(config.model_copy(update={"name": base})))


def _digest(path: Path) -> str:
    """Of the whole file, but of weights of so many places: training changes them everywhere, and they may be large."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix != ".safetensors" or size <= _PLACES * _PLACE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for place in range(_PLACES):
            file.seek(place * (size - _PLACE_BYTES) // (_PLACES - 1))
            digest.update(file.read(_PLACE_BYTES))
        return digest.hexdigest()
