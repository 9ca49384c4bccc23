"""The structs of a call's arguments, made of keyword arguments and tensors.

Shapes and element types of tensors are held against the plan here, since the library sees addresses, bytes and strides alone: it
would read a tensor of other heads as if it were one of the plan's.
"""

from __future__ import annotations

from typing import Any

from treeattn import _abi
from treeattn._c import sized
from treeattn._tensors import DTYPE_NAMES, View, dtype_code, fill, view

# Bytes of a block of 32 values, by type.
_BLOCKS = {
    _abi.DTYPE_Q8_0: 34,
    _abi.DTYPE_Q4_0: 18,
    _abi.DTYPE_Q4_1: 20,
    _abi.DTYPE_Q5_0: 22,
    _abi.DTYPE_Q5_1: 24,
    _abi.DTYPE_IQ4_NL: 18,
}
_BLOCK_VALUES = 32

# Enumerations that fields of the descriptor name by words.
_PREFIXES = {"algorithm": "ALGORITHM", "output": "OUTPUT", "kv_layout": "KV_LAYOUT", "mask": "MASK", "query_input": "QUERY_INPUT",
             "reproducibility": "REPRODUCIBILITY"}  # fmt: skip
_DESC_FIELDS = {name for name, *_ in _abi.AttentionDesc._fields_}
_ARGS_FIELDS = {name for name, *_ in _abi.DecodeArgs._fields_}
INDEX_FIELDS = ("query_start", "kv_length", "global_length", "kv_start", "kv_position", "query_position", "block_table",
                "page_indptr", "page_indices", "last_page_len")  # fmt: skip
# Tensors of a step beside q, k, v and the outputs, and their dimensions.
TENSOR_FIELDS = {"k_scale": 3, "v_scale": 3, "alibi_slopes": 1, "sinks": 1, "mask": 4, "mask_factor": 1}


def describe(*, dtype: str | None = None, **fields: Any) -> _abi.AttentionDesc:
    """A `treeattn_attention_desc_t` of its fields.

    Types are names ("float16", "q8_0") or numbers; `dtype` stands for those of q, k, v and the output that are not given.
    `head_dim_v` is `head_dim_qk` where it is not given, and `placement` may be ("interleaved", 16).
    """
    desc = sized(_abi.AttentionDesc)
    kv_heads = fields.get("kv_heads", 0)
    types = ("q_dtype", "k_dtype", "v_dtype", "out_dtype") if kv_heads else ("out_dtype",)
    fields = {name: dtype or "float32" for name in types} | fields
    if "head_dim_qk" in fields:
        fields.setdefault("head_dim_v", fields["head_dim_qk"])
    placement = fields.pop("placement", None)
    if placement is not None:
        kind, interleave = placement if isinstance(placement, tuple) else (placement, 0)
        desc.placement.kind = getattr(_abi, f"PLACEMENT_{kind.upper()}") if isinstance(kind, str) else kind
        desc.placement.interleave = interleave
    for name, value in fields.items():
        if name not in _DESC_FIELDS:
            raise TypeError(f"treeattn_attention_desc_t has no field {name}")
        if isinstance(value, str):
            value = getattr(_abi, f"{_PREFIXES[name]}_{value.upper()}") if name in _PREFIXES else dtype_code(value)
        setattr(desc, name, value)
    return desc


def _shaped(what: str, tensor: View, *wanted: int | None) -> View:
    """@raises ValueError: a tensor of another shape; None stands for any size."""
    if len(tensor.shape) != len(wanted) or any(size not in (None, found) for size, found in zip(wanted, tensor.shape)):
        text = ", ".join("any" if size is None else str(size) for size in wanted)
        raise ValueError(f"{what} is {list(tensor.shape)}; wanted [{text}]")
    return tensor


def _typed(what: str, tensor: View, code: int) -> View:
    """@raises TypeError: a tensor of another element type."""
    if DTYPE_NAMES.get(tensor.dtype) != code:
        wanted = next((name for name, number in DTYPE_NAMES.items() if number == code), f"type {code}")
        raise TypeError(f"{what} is {tensor.dtype}; wanted {wanted}")
    return tensor


def _cached(what: str, tensor: Any, code: int, heads: int, dim: int) -> View | None:
    """Keys or values, [sequence, token, kv head, dim] or pages. Those of block types are given as their bytes."""
    if tensor is None:
        return None
    tensor = view(tensor)
    if code not in _BLOCKS:
        return _shaped(what, _typed(what, tensor, code), None, None, heads, dim)
    if tensor.dtype != "uint8":
        raise TypeError(f"{what} is {tensor.dtype}; wanted the bytes of its blocks, uint8")
    _shaped(what, tensor, None, None, heads, dim // _BLOCK_VALUES * _BLOCKS[code])
    return View(**vars(tensor) | {"stride": (*tensor.stride[:-1], _BLOCKS[code])})


def _index(what: str, value: Any) -> int | None:
    """The address of an array of int32."""
    if value is None or isinstance(value, int):
        return value
    found = view(value)
    if found.dtype != "int32" or not found.contiguous:
        raise TypeError(f"{what} is {found.dtype}{'' if found.contiguous else ', not contiguous'}; wanted int32, contiguous")
    return found.data


def _broadcast(what: str, tensor: Any, dims: int) -> View:
    """A tensor of that many dimensions: those that it lacks in front, and those of size 1, have stride 0."""
    found = view(tensor)
    lacking = dims - len(found.shape)
    if lacking < 0:
        raise ValueError(f"{what} is {list(found.shape)}; wanted at most {dims} dimensions")
    stride = (0,) * lacking + tuple(0 if size == 1 else step for size, step in zip(found.shape, found.stride))
    return View(**vars(found) | {"shape": (1,) * lacking + found.shape, "stride": stride})


def _side_tensor(name: str, tensor: Any, desc: _abi.AttentionDesc) -> View:
    """A tensor of `TENSOR_FIELDS`, which broadcasts as NumPy does."""
    found = _broadcast(name, tensor, TENSOR_FIELDS[name])
    heads = desc.kv_heads if name.endswith("_scale") else desc.q_heads
    place = 1 if name == "mask" else -1
    if found.shape[place] not in (1, heads):
        raise ValueError(f"{name} is {list(view(tensor).shape)}; wanted {heads} heads, or 1 for all")
    if name == "mask" and desc.mask == _abi.MASK_BOOLEAN:
        if found.itemsize != 1:
            raise TypeError(f"mask is {found.dtype}; wanted bool or bytes")
        return found
    return _typed(name, found, desc.mask_dtype if name == "mask" else _abi.DTYPE_F32)


def _sizes(fields: dict[str, Any], k: View | None, kv_heads: int) -> dict[str, int]:
    """What the shapes of index arrays say, for what is not given."""
    sizes: dict[str, int] = {}
    shapes = {name: view(value).shape for name, value in fields.items() if name in INDEX_FIELDS and not isinstance(value, int | None)}
    if "block_table" in shapes:
        sizes["max_pages"] = shapes["block_table"][-1]
    if (shape := shapes.get("page_indices")) is not None:
        sizes["num_page_indices"] = shape[-1] * (kv_heads if len(shape) == 2 else 1)
        if len(shape) == 2:
            sizes["page_index_head_stride"] = shape[-1]
    if k is not None and ("block_table" in shapes or "page_indices" in shapes):
        sizes["num_pages"] = k.shape[0]
    if (shape := shapes.get("kv_position")) is not None:
        sizes["kv_position_stride"] = shape[-1] * (kv_heads if len(shape) == 3 else 1)
        if len(shape) == 3:
            sizes["kv_position_head_stride"] = shape[-1]
    return sizes


def decode_arguments(desc: _abi.AttentionDesc, heads: tuple[int, int], q: Any, k: Any, v: Any, out: Any, lse: Any, batch: int | None,
                     fields: dict[str, Any]) -> _abi.DecodeArgs:  # fmt: skip
    """A `treeattn_decode_args_t`. `heads`: those of q and of the outputs."""
    args = sized(_abi.DecodeArgs)
    q = _shaped("q", _typed("q", view(q), desc.q_dtype), None, heads[0], desc.head_dim_qk)
    tokens = q.shape[0]
    keys = _cached("k", k, desc.k_dtype, desc.kv_heads, desc.head_dim_qk)
    fill(args.q, q)
    fill(args.k, keys)
    fill(args.v, _cached("v", v, desc.v_dtype, desc.kv_heads, desc.head_dim_v))
    fill(args.out, _shaped("out", _typed("out", view(out), desc.out_dtype), tokens, heads[1], desc.head_dim_v))
    if lse is not None:
        fill(args.lse, _shaped("lse", _typed("lse", view(lse), _abi.DTYPE_F32), tokens, heads[1]))
    args.query_tokens = tokens
    lengths = next((fields[name] for name in ("kv_length", "last_page_len") if fields.get(name) is not None), None)
    if batch is None and (lengths is None or isinstance(lengths, int)):
        raise TypeError("batch is needed where the lengths are no tensor")
    args.batch = view(lengths).shape[0] if batch is None else batch
    for name, value in (_sizes(fields, keys, desc.kv_heads) | fields).items():
        if name not in _ARGS_FIELDS:
            raise TypeError(f"treeattn_decode_args_t has no field {name}")
        if name in INDEX_FIELDS:
            setattr(args, name, _index(name, value))
        elif name not in TENSOR_FIELDS:
            setattr(args, name, value)
        elif value is not None:
            fill(getattr(args, name), _side_tensor(name, value, desc))
    return args


def merge_arguments(o: Any, lse: Any, out: Any, out_lse: Any = None, *, sum: Any = None, query_start: Any = None,
                    kv_length: Any = None, batch: int | None = None, lse_base: int = 0, out_lse_base: int = 0,
                    flags: int = 0) -> _abi.MergeArgs:  # fmt: skip
    """A `treeattn_merge_args_t` of partials o [..., token, head, dim], lse and sum [..., token, head].

    The output is [token, head, dim], and `batch` is what the shapes of `kv_length` or `query_start` say where it is not given.
    """
    o, lse, out = view(o), view(lse), view(out)
    args = sized(_abi.MergeArgs, query_tokens=o.shape[-3], o_dtype=dtype_code(o.dtype), out_dtype=dtype_code(out.dtype))
    args.lse_base, args.out_lse_base, args.flags = lse_base, out_lse_base, flags
    fill(args.o, o)
    fill(args.lse, _shaped("lse", _typed("lse", lse, _abi.DTYPE_F32), *o.shape[:-1]))
    fill(args.out, _shaped("out", out, o.shape[-3], None, o.shape[-1]))
    if out_lse is not None:
        fill(args.out_lse, _shaped("out_lse", _typed("out_lse", view(out_lse), _abi.DTYPE_F32), *out.shape[:-1]))
    if sum is not None:
        fill(args.sum, _shaped("sum", _typed("sum", view(sum), _abi.DTYPE_F32), *o.shape[:-1]))
    args.query_start, args.kv_length = _index("query_start", query_start), _index("kv_length", kv_length)
    if batch is None:
        counts = [view(array).shape[0] - less for array, less in ((kv_length, 0), (query_start, 1)) if array is not None]
        if len(set(counts)) > 1:
            raise ValueError(f"query_start is [{counts[1] + 1}]; wanted [{counts[0] + 1}], one more than kv_length")
        batch = counts[0] if counts else 0
    args.batch = batch
    return args
