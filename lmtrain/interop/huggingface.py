"""Models in the format of the Hugging Face hub: a folder of config.json, *.safetensors and tokenizer.json, read.

`export.py` writes them. Tensors are read straight into the shards of a mesh: what exists on the host at once is one
shard of one of our arrays, never a tensor of all layers, never the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from lmtrain.data import tokenizer as tokenizer_lib
from lmtrain.interop.families import FAMILIES, Family, Weight
from lmtrain.interop.fields import Fields
from lmtrain.interop.layout import expected
from lmtrain.models import transformer
from lmtrain.models.shapes import groups
from lmtrain.schema import ConfigError, Model
from lmtrain.types import LmtrainError, Params, nearest

PREFIX = "hf:"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SAMPLES, BLOCK = 256, 1 << 12  # of a file, in Folder.identity
#: Ends of the names of buffers that older files hold and no model reads: masks, tables of rotary frequencies.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
#: What is fetched of a model on the hub.
FILES = ("*.json", "*.safetensors", "*.jinja")


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder whose config.json has been understood.

    Attributes:
      path: the folder.
      family: its table.
      model: what config.json says, resolved.
      files: the file of every tensor.
      strip: what the names in the files lack of the family's: GPT-2's say h.0, not transformer.h.0.
      dtype: of the stored tensors: float32, bfloat16 or float16.
    """

    path: pathlib.Path
    family: Family
    model: Model
    files: dict[str, pathlib.Path]
    strip: str
    dtype: str

    @property
    def identity(self) -> str:
        """A hash that stands for the weights: of config.json, and of each file of tensors its name, its size and
        SAMPLES blocks at even distances. No dates, so that a copy is the same; not every byte, which would take as long
        as reading the model."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted(set(self.files.values())):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as f:
                for i in range(SAMPLES):
                    f.seek(i * max(0, size - BLOCK) // (SAMPLES - 1))
                    digest.update(f.read(BLOCK))
        return digest.hexdigest()

    def tokenizer(self) -> tokenizer_lib.Tokenizer:
        """Its tokenizer.

        Raises:
          LmtrainError: no tokenizer.json, one that cannot encode every byte, or one with more tokens than the model.
        """
        if not (self.path / "tokenizer.json").exists():
            raise LmtrainError(
                f"{self.path}: no tokenizer.json. Save it with a fast tokenizer: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            )
        tok = tokenizer_lib.load(self.path)
        if tok.vocab_size > self.model.vocab_size:
            raise LmtrainError(
                f"{self.path}: tokenizer.json has {tok.vocab_size} tokens, but config.json's vocab_size is "
                f"{self.model.vocab_size}: it belongs to another model."
            )
        return tok

    def params(self, shardings: Any = None, dtype: str = "float32") -> Params:
        """The parameters, a tree like transformer.init's; NumPy arrays, or jax arrays by their shardings.

        Args:
          shardings: the parameters' tree of shardings.
          dtype: "float32", what training starts from, or "stored": as they lie in the files.

        Raises:
          LmtrainError: a file that is cut short or damaged.
        """
        dtype = self.dtype if dtype == "stored" else dtype
        count, body, _ = groups(self.model)

        def make(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct, sharding: NamedSharding | None) -> Any:
            names = [key.key for key in path]
            if names[0] in ("layers", "tail"):
                place, ours = int(names[1]), "/".join(names[2:])
                numbers = [g * len(body) + place for g in range(count)] if names[0] == "layers" else [
                    count * len(body) + place]  # fmt: skip
                weight = _find(self.family.layer, ours)
            else:
                numbers, weight = [], _find(self.family.ends, "/".join(names))
            read = lambda index: self._block(weight, numbers, shape.shape, index).astype(dtype, copy=False)  # noqa: E731
            if sharding is None:
                return read(tuple(slice(None) for _ in shape.shape))
            return sharded(shape.shape, sharding, read)

        shapes = transformer.shapes(self.model)
        if shardings is None:
            return jax.tree_util.tree_map_with_path(lambda path, shape: make(path, shape, None), shapes)
        return jax.tree_util.tree_map_with_path(make, shapes, shardings)

    def _block(self, weight: Weight, numbers: list[int], shape: tuple[int, ...], index: tuple[slice, ...]) -> Any:
        """ours[index] of one of our arrays, of which `numbers` are the layers that its first dimension stacks."""
        bounds = [s.indices(n) for s, n in zip(index, shape, strict=True)]
        ranges = [range(*b) for b in bounds]
        if not numbers:
            return self._one(weight, {}, shape, ranges)
        parts = []
        for at in ranges[0]:
            if "{e}" in weight.theirs:
                experts = [self._one(weight, {"l": numbers[at], "e": e}, shape[2:], ranges[2:]) for e in ranges[1]]
                parts.append(np.stack(experts))
            else:
                parts.append(self._one(weight, {"l": numbers[at]}, shape[1:], ranges[1:]))
        return np.stack(parts)

    def _one(self, weight: Weight, where: dict[str, int], shape: tuple[int, ...], ranges: list[range]) -> Any:
        """A block of one of our arrays, or of one layer of it, out of the tensor that holds it."""
        name = weight.theirs.format(**where)
        first = weight.before(self.model) if weight.before else 0
        sizes = [len(r) for r in ranges]
        if weight.ins == 0:
            rows = ranges[0]
            block = self._read(name, (slice(first + rows.start, first + rows.stop), *map(_slice, ranges[1:])))
            return block.reshape(sizes)
        ins = _flat(ranges[: weight.ins], shape[: weight.ins])
        outs = _flat(ranges[weight.ins :], shape[weight.ins :])
        outs = slice(first + outs.start, first + outs.stop)
        block = self._read(name, (ins, outs) if weight.flat else (outs, ins))
        return (block if weight.flat else block.T).reshape(sizes)

    def _read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """tensor[index]. The file is closed again at once: as long as it is open, the pages read stay in memory."""
        with opened(self.files[name]) as tensors:
            block: np.ndarray = tensors.get_slice(name.removeprefix(self.strip))[index]
            return block


# ---------------------------------------------------------------------------------------------------------- opening
def open_folder(name: str) -> Folder:
    """Reads config.json of a folder, or of a model on the hub, and checks that all its tensors are there.

    Args:
      name: a folder, or "owner/model", which is downloaded where there is a network; "hf:" may stand before it.

    Raises:
      LmtrainError: an architecture or field that is not understood; a missing, superfluous, cut or misshapen tensor.
    """
    path = _find_folder(name.removeprefix(PREFIX))
    family, model = read_config(path / "config.json")
    model = transformer.resolve(model)
    files = find_tensors(path)
    files, strip, dtype = check_tensors(path, family, model, files)
    return Folder(path, family, model, files, strip, dtype)


def _find_folder(name: str) -> pathlib.Path:
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise LmtrainError(f"{path}: no config.json, so it is no model of Hugging Face's format.")
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise LmtrainError(f"{PREFIX}{name}: no such folder.{nearest(path.name, beside)}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise LmtrainError(
            f"{PREFIX}{name}: no such folder here; to fetch it from the hub, pip install -e '.[data]'."
        ) from None
    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # of many kinds: no network, no such model, no permission
        said = (str(error) or repr(error)).splitlines()[0]
        raise LmtrainError(f"{PREFIX}{name}: no such folder here, and not to be had from the hub: {said}") from None


def read_config(file: pathlib.Path) -> tuple[Family, Model]:
    """The family and the model that a config.json describes.

    Raises:
      LmtrainError: it is no JSON object, of an architecture without a table, or has a field that is not understood.
    """
    return read_values(_json(file), str(file))


def read_values(values: dict[str, Any], where: str) -> tuple[Family, Model]:
    """The same of the object itself; `where` is its file, for messages."""
    kind = values.get("model_type")
    if kind not in FAMILIES:
        hint = nearest(str(kind), FAMILIES)
        raise LmtrainError(f"{where}: model_type is {kind!r}; lmtrain reads {', '.join(FAMILIES)}.{hint}")
    family = FAMILIES[kind]
    architectures = values.get("architectures")
    named = architectures or [family.architecture]
    base = family.architecture.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")
    if not isinstance(named, list) or not set(named) <= {family.architecture, base}:
        raise LmtrainError(f"{where}: architectures is {named}; lmtrain reads {family.architecture} of {kind}.")
    f = Fields(values, where)
    model: dict[str, Any] = dict(family.fixed)
    types = {x.name: type(x.default) for x in dataclasses.fields(Model)}
    for theirs, ours in family.fields.items():
        model[ours] = f.take(theirs, family.defaults.get(theirs), types[ours])
    for theirs, allowed in family.only.items():
        f.only(theirs, *allowed)
    for read, _ in family.aspects:
        read(f, model)
    f.done({*family.fields, *family.only})
    try:
        return family, transformer.resolve(Model(**model, zero_init=False))
    except ConfigError as error:
        raise LmtrainError(f"{where}: {error}") from None


def find_tensors(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """The file of every tensor of a folder: by its index, or those of model.safetensors."""
    if (path / INDEX).exists():
        mapped = _json(path / INDEX).get("weight_map")
        if not isinstance(mapped, dict):
            raise LmtrainError(f"{path / INDEX}: no weight_map, which says in which file each tensor is.")
        for shard in sorted(set(mapped.values())):
            if not (path / shard).exists():
                of = len(set(mapped.values()))
                raise LmtrainError(f"{path}: {shard} is missing, of {of} files that {INDEX} names.")
        files = {name: path / shard for name, shard in mapped.items()}
        for shard in sorted(set(mapped.values())):
            with opened(path / shard) as tensors:
                held = set(tensors.keys())
            if lost := sorted(name for name, s in mapped.items() if s == shard and name not in held):
                raise LmtrainError(f"{path / shard}: holds no tensor {lost[0]}, which {INDEX} says it does.")
        return files
    if (path / SINGLE).exists():
        with opened(path / SINGLE) as tensors:
            return dict.fromkeys(tensors.keys(), path / SINGLE)
    if found := sorted(p.name for p in path.glob("*.safetensors")):
        raise LmtrainError(f"{path}: {found[0]}, but no {INDEX} that says what is in it.")
    older = next((p.name for p in path.glob("*.bin")), None)
    hint = f"; {older} is torch's own format, to be saved anew with save_pretrained" if older else ""
    raise LmtrainError(f"{path}: no {SINGLE} and no {INDEX}{hint}.")


def check_tensors(
    path: pathlib.Path, family: Family, model: Model, files: dict[str, pathlib.Path]
) -> tuple[dict[str, pathlib.Path], str, str]:
    """Compares names, shapes and dtypes with what the configuration asks for, before anything is read.

    Returns:
      (the file of every tensor, by the family's names; what the names in the files lack of those; most tensors' dtype)
    """
    strip = "" if any(name.startswith(family.prefix) for name in files) else family.prefix
    files = {strip + name if name != "lm_head.weight" else name: file for name, file in files.items()}
    wanted = expected(family, model)
    for name in wanted:
        if name not in files:
            hint = nearest(name, files)
            raise LmtrainError(f"{path}: tensor {name} is missing, {list(wanted[name])} by config.json.{hint}")
    extra = sorted(n for n in files.keys() - wanted.keys() if not n.endswith(BUFFERS) and n != "lm_head.weight")
    if extra:
        raise LmtrainError(f"{path}: tensor {extra[0]} has no place in the model that config.json describes.")
    dtypes: dict[str, int] = {}
    for file in sorted(set(files.values())):
        with opened(file) as tensors:
            for name in (n for n, f in files.items() if f == file and n in wanted):
                tensor = tensors.get_slice(name.removeprefix(strip))
                shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                if shape != wanted[name]:
                    raise LmtrainError(
                        f"{file}: tensor {name} is {list(shape)}, but {list(wanted[name])} by config.json."
                    )
                if dtype not in DTYPES:
                    raise LmtrainError(f"{file}: tensor {name} is {dtype}; lmtrain reads {', '.join(DTYPES)}.")
                dtypes[dtype] = dtypes.get(dtype, 0) + int(np.prod(shape))
    return files, strip, DTYPES[max(dtypes, key=lambda d: dtypes[d])]


# ------------------------------------------------------------------------------------------------------------- details
def sharded(shape: tuple[int, ...], sharding: NamedSharding, read: Callable[[tuple[slice, ...]], Any]) -> jax.Array:
    """An array of blocks, each read, handed to its devices and let go before the next.

    jax.make_array_from_callback has all blocks on the host at once, beside those on the devices.
    """
    blocks: dict[tuple[Any, ...], tuple[tuple[slice, ...], list[Any]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        key = tuple(s.indices(n) for s, n in zip(index, shape, strict=True))
        blocks.setdefault(key, (index, []))[1].append(device)
    arrays = []
    for index, devices in blocks.values():
        block = read(index)
        arrays += [jax.device_put(block, device).block_until_ready() for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


@contextlib.contextmanager
def opened(file: pathlib.Path) -> Iterator[Any]:
    """A file of tensors, opened. Raises LmtrainError where it is cut short or no safetensors file at all."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise LmtrainError(f"{file}: cut short or damaged, it does not read as safetensors ({error}).") from None


def _find(table: tuple[Weight, ...], ours: str) -> Weight:
    return next(weight for weight in table if weight.ours == ours)


def _slice(r: range) -> slice:
    return slice(r.start, r.stop)


def _flat(ranges: list[range], shape: tuple[int, ...]) -> slice:
    """Neighbouring dimensions as one, of which only the first is cut."""
    inner = int(np.prod(shape[1:]))
    if any(len(r) != n for r, n in zip(ranges[1:], shape[1:], strict=True)):
        raise ValueError(f"a block that cuts an inner dimension of {shape}: {ranges}")
    return slice(ranges[0].start * inner, ranges[0].stop * inner)


def _json(file: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LmtrainError(f"{file}: cannot be read as JSON ({error}).") from None
    if not isinstance(value, dict):
        raise LmtrainError(f"{file}: {type(value).__name__}, but takes an object.")
    return value
