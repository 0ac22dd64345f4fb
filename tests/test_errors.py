"""Bad calls get a sentence: the argument, what was expected, what came. None may crash."""

import re

import numpy as np
import pytest
import torch
from producers import (  # noqa: F401 (some are named in the table's calls only)
    BFLOAT,
    COMPLEX,
    READ_ONLY,
    Answers,
    NoDevice,
    Old,
    Producer,
    Shared,
)

import lightforcing as lf

CUDA_PRODUCER = (
    (TypeError, "x: expected a library whose current CUDA stream is known (torch, CuPy)")
    if lf.info()["cuda_built"]
    else (
        NotImplementedError,
        "compress: expected tensors on the CPU, got cuda:1: ...no CUDA half...",
    )
)

T = 4
Q, K = (1, 8, 2, 16), (1, 24, 2, 16)
q, k, v = torch.ones(Q), torch.ones(K), torch.ones(K)
array = np.ones(K, np.float32)
KEEP = np.ones((1, 2, 1, 6), bool)


def f(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def compress(x=k, frame_tokens=T, **options):
    return lf.compress(x, frame_tokens, **options)


def select(q=q, k=k, **options):
    return lf.select_blocks(q, k, **{"frame_tokens": T, "sparsity": 0.5, **options})


def attend(q=q, k=k, v=v, blocks=None, **options):
    return lf.block_sparse_attention(q, k, v, blocks, **options)


def blocks(indices=((0, 2, 5),), counts=None, *, q_len=8, k_len=24, frame_tokens=T, **geometry):
    """A list for q and k with `indices` as the row of each head."""
    rows = np.array(indices, np.int32)
    rows = np.broadcast_to(rows, (1, 2, 1, rows.shape[-1])).copy()
    counts = rows.shape[-1] if counts is None else counts
    geometry = {"block_q": 16, "block_k": 16, **geometry}
    counts = np.full((1, 2, 1), counts, np.int32)
    return lf.BlockList(rows, counts, q_len, k_len, frame_tokens, **geometry)


def attend_list(*arguments, **options):
    return attend(blocks=blocks(*arguments, **options))


def readonly(shape):
    made = np.zeros(shape, np.float32)
    made.flags.writeable = False
    return made


def freed():
    tensor = f(*K)
    tensor.untyped_storage().resize_(0)
    return tensor


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(K)


def needs_grad(shape=K):
    return torch.ones(shape, requires_grad=True)


def used():
    """A capsule that somebody else has already consumed."""
    return Answers(capsule=Producer(array, name=b"used_dltensor_versioned").__dlpack__())


def schedule(*arguments, **options):
    return lf.cag_schedule(*arguments, **options)


def lists(indices_shape, counts_shape, dtype=np.int32):
    return lf.BlockList(
        np.zeros(indices_shape, dtype), np.ones(counts_shape, dtype), 8, 24, T, 16, 16
    )


def from_bool(keep):
    return lf.BlockList.from_bool(keep, 8, 24, T, 16, 16)


# The call, the exception, and its whole text; "..." stands for anything.
BAD = [
    # ---- kinds of tensors
    ("compress([1.0])", TypeError,
     "x: expected a torch tensor, a NumPy array or an object with __dlpack__, got list"),
    ("attend(k=None)", TypeError,
     "k: expected a torch tensor, a NumPy array or an object with __dlpack__, got NoneType"),
    ('select(q="q")', TypeError,
     "q: expected a torch tensor, a NumPy array or an object with __dlpack__, got str"),
    ("compress(k.double())", TypeError,
     "x: expected float32, float16 or bfloat16, got float64"),
    ("compress(array.astype(float))", TypeError,
     "x: expected float32, float16 or bfloat16, got NumPy float64"),
    ("compress(k.int())", TypeError, "x: expected float32, float16 or bfloat16, got int32"),
    ("attend(q=q.long())", TypeError, "q: expected float32, float16 or bfloat16, got int64"),
    ("attend(v=v.bool())", TypeError,
     "v: expected float32, float16 or bfloat16, got bool"),
    ("attend(q=q.to(torch.complex64))", TypeError,
     "q: expected float32, float16 or bfloat16, got complex64"),
    ("compress(k.to(torch.float8_e4m3fn))", TypeError,
     "x: expected float32, float16 or bfloat16, got DLPack type code 10"),
    ('compress(array.astype(">f4"))', ValueError,
     "x: expected aligned elements in this machine's byte order"),
    ("compress(array.astype(object))", TypeError,
     "x: expected float32, float16 or bfloat16, got NumPy object"),
    ("compress(np.ones(4 * 768 + 1, np.uint8)[1:].view(np.float32).reshape(K))", ValueError,
     "x: expected aligned elements in this machine's byte order"),
    ("attend(k=k.half())", TypeError, "k: expected float32 as q has, got float16"),
    ("attend(v=v.bfloat16())", TypeError, "v: expected float32 as q has, got bfloat16"),
    ("select(k=k.half())", TypeError, "k: expected float32 as q has, got float16"),
    ("compress(k.to_sparse())", TypeError, "x: cannot be read through DLPack: ..."),
    ('compress(k.to("meta"))', TypeError, "x: cannot be read through DLPack: ...meta"),
    ('attend(k=k.to("meta"))', TypeError, "k: cannot be read through DLPack: ...meta"),
    ("compress(fake())", ValueError,
     "x: expected memory behind it, got none (a fake, meta or freed tensor)"),
    ("compress(freed())", ValueError,
     "x: expected memory behind it, got none (a fake, meta or freed tensor)"),
    ("attend(v=freed())", ValueError,
     "v: expected memory behind it, got none (a fake, meta or freed tensor)"),
    ("attend(q=needs_grad(Q))", ValueError,
     "q: expected a tensor without grad, got one that requires it..."),
    ("select(k=needs_grad())", ValueError,
     "k: expected a tensor without grad, got one that requires it..."),
    ("compress(torch.nn.Parameter(k))", ValueError,
     "x: expected a tensor without grad, got one that requires it..."),
    ("select(k_means=needs_grad((1, 6, 2, 16)))", ValueError,
     "k_means: expected a tensor without grad, got one that requires it..."),
    ("attend(out=needs_grad(Q))", ValueError,
     "out: expected a tensor without grad, got one that requires it..."),
    ("compress(torch._neg_view(k))", ValueError,
     "x: expected plain values, got a lazy negative or conjugate view"),
    ("compress(torch.ones(K, dtype=torch.complex64).conj())", ValueError,
     "x: expected plain values, got a lazy negative or conjugate view"),
    # ---- malformed DLPack producers
    ("compress(NoDevice())", AttributeError,
     "x: cannot be read through DLPack: 'NoDevice' object has no attribute '__dlpack_device__'"),
    ('compress(Answers(device=OSError("x9")))', OSError, "x: cannot be read through DLPack: x9"),
    ("compress(Answers(device=1))", TypeError,
     "x: expected __dlpack_device__() to give (type, id)"),
    ('compress(Answers(device=("cpu", 0)))', TypeError,
     "x: expected __dlpack_device__() to give (type, id)"),
    ("compress(Answers(capsule=7))", TypeError,
     "x: expected __dlpack__() to give a fresh DLPack capsule, got int"),
    ('compress(Producer(array, name=b"tensor"))', TypeError,
     "x: expected __dlpack__() to give a fresh DLPack capsule, got tensor"),
    ("compress(used())", TypeError,
     "x: expected __dlpack__() to give a fresh DLPack capsule, got used_dltensor_versioned"),
    ('compress(Producer(array, error=OSError("gone")))', OSError,
     "x: cannot be read through DLPack: gone"),
    ('attend(k=Answers(capsule=BufferError("no")))', TypeError,
     "k: cannot be read through DLPack: no"),
    ("compress(Producer(array, version=(2, 0)))", TypeError, "x: expected DLPack version 1, got 2"),
    ("compress(Producer(array, data=None))", ValueError,
     "x: expected memory behind it, got none (a fake, meta or freed tensor)"),
    ("compress(Producer(array, shape=None))", ValueError,
     "x: expected a shape, got a DLPack tensor without one"),
    ("compress(Producer(array, shape=[1, -24, 2, 16]))", ValueError,
     "x: expected sizes of 0 or more, got -24 (dimension 1)"),
    ("compress(Producer(array, shape=[2**40, 2**40, 2, 16]))", ValueError,
     "x: expected a size below 2^59 elements, got more"),
    ("compress(Producer(array, strides=[2**62, 2**62, 2**62, 1]))", ValueError, "x: expected ..."),
    ("compress(Producer(array, ndim=-1))", ValueError, "x: expected at most 8 dimensions, got -1"),
    ("compress(Producer(array, ndim=99))", ValueError, "x: expected at most 8 dimensions, got 99"),
    ("compress(Producer(array, ndim=3))", ValueError,
     "x: expected 4 dimensions (B, L, H, D), got 3"),
    ("compress(Producer(array, strides=[768, 32, 16, 2]))", ValueError,
     "x: expected a last stride of 1, got 2"),
    ("compress(Producer(array, byte_offset=2))", ValueError,
     "x: expected data aligned to its 4-byte elements"),
    ("compress(Producer(array, bits=64))", TypeError,
     "x: expected float32, float16 or bfloat16, got float64"),
    ("compress(Producer(array, lanes=2))", TypeError,
     "x: expected float32, float16 or bfloat16, got vectors of 2 values"),
    ("compress(Producer(array, code=COMPLEX, bits=64))", TypeError,
     "x: expected float32, float16 or bfloat16, got complex64"),
    ("compress(Producer(array, code=200))", TypeError,
     "x: expected float32, float16 or bfloat16, got DLPack type code 200"),
    ("compress(Producer(array, code=BFLOAT))", TypeError,
     "x: expected float32, float16 or bfloat16, got bfloat32"),
    ("compress(Producer(array, device=(8, 0)))", NotImplementedError,
     "x: expected a tensor on the CPU or a CUDA device, got DLPack device type 8"),
    ("compress(Producer(array, device=(2, 1)))", *CUDA_PRODUCER),
    ("attend(k=Producer(array, device=(2, 0)))", ValueError,
     "k: is on cuda:0, but q is on the CPU"),
    ("compress(Old(array, data=None))", ValueError,
     "x: expected memory behind it, got none (a fake, meta or freed tensor)"),
    # ---- shapes
    ("compress(f(24, 2, 16))", ValueError, "x: expected 4 dimensions (B, L, H, D), got 3"),
    ("compress(torch.tensor(1.0))", ValueError, "x: expected 4 dimensions (B, L, H, D), got 0"),
    ("compress(f(*[1] * 9))", ValueError, "x: expected at most 8 dimensions, got 9"),
    ("compress(np.float32(1))", TypeError,
     "x: expected a torch tensor, a NumPy array or an object with __dlpack__, got float32"),
    ("compress(f(1, 24, 2, 12))", ValueError,
     "x: expected a head size D that is a multiple of 8 up to 256, got 12"),
    ("attend(f(1, 8, 2, 264), f(1, 24, 2, 264), f(1, 24, 2, 264))", ValueError,
     "q: expected a head size D that is a multiple of 8 up to 256, got 264"),
    ("attend(f(1, 8, 2, 0), f(1, 24, 2, 0), f(1, 24, 2, 0))", ValueError,
     "q: expected a head size D that is a multiple of 8 up to 256, got 0"),
    ("attend(k=f(1, 24, 3, 16))", ValueError, "k: dimension 2 (H) is 3, but q has H = 2"),
    ("select(k=f(2, 24, 2, 16))", ValueError, "k: dimension 0 (B) is 2, but q has B = 1"),
    ("attend(v=f(1, 24, 2, 24))", ValueError, "v: dimension 3 (D) is 24, but q has D = 16"),
    ("attend(v=f(1, 20, 2, 16))", ValueError, "v: dimension 1 (Lk) is 20, but k has Lk = 24"),
    ("attend(q=f(1, 0, 2, 16))", ValueError, "q: expected 1 token or more, got 0"),
    ("attend(k=f(1, 0, 2, 16), v=f(1, 0, 2, 16))", ValueError,
     "k: expected 1 token or more, got 0"),
    ("compress(f(1, 24, 16, 2).mT)", ValueError, "x: expected a last stride of 1, got 2"),
    ("attend(q=f(1, 8, 2, 32)[..., ::2])", ValueError, "q: expected a last stride of 1, got 2"),
    ("compress(frame_tokens=5)", ValueError,
     "x: expected whole frames of 5 tokens (frame_tokens), got L = 24"),
    ("select(q=f(1, 6, 2, 16))", ValueError,
     "q: expected whole frames of 4 tokens (frame_tokens), got Lq = 6"),
    ("select(k=f(1, 23, 2, 16))", ValueError,
     "k: expected whole frames of 4 tokens (frame_tokens), got Lk = 23"),
    ("select(k=f(1, 4, 2, 16))", ValueError,
     "q: expected 1 to Lk = 4 tokens (q is the last part of k), got 8"),
    ("select(q=f(1, 0, 2, 16))", ValueError,
     "q: expected 1 to Lk = 24 tokens (q is the last part of k), got 0"),
    # ---- numbers
    ("compress(frame_tokens=0)", ValueError, "frame_tokens: expected 1 or more, got 0"),
    ("select(frame_tokens=-4)", ValueError, "frame_tokens: expected 1 or more, got -4"),
    ("compress(frame_tokens=2**70)", ValueError,
     "frame_tokens: expected 1 or more, got 1180591620717411303424"),
    ("compress(frame_tokens=4.0)", TypeError, "frame_tokens: expected an integer, got 4.0"),
    ("compress(f(1, 1, 1, 8), True)", TypeError, "frame_tokens: expected an integer, got True"),
    ('select(frame_tokens="4")', TypeError, "frame_tokens: expected an integer, got '4'"),
    ("compress(block=48)", ValueError, "block: expected a power of two from 4 to 128, got 48"),
    ("compress(block=2)", ValueError, "block: expected 4 to 128, got 2"),
    ("compress(block=256)", ValueError, "block: expected 4 to 128, got 256"),
    ("compress(block=None)", TypeError, "block: expected an integer, got None"),
    ("select(block_k=8)", ValueError, "block_k: expected 16 to 128, got 8"),
    ("select(block_k=96)", ValueError, "block_k: expected a power of two from 16 to 128, got 96"),
    ("select(block_q=8)", ValueError, "block_q: expected 16 to 128, got 8"),
    ("select(block_q=129)", ValueError, "block_q: expected 16 to 128, got 129"),
    ("select(sparsity=-0.1)", ValueError, "sparsity: expected a number in [0, 1], got -0.1"),
    ("select(sparsity=1.5)", ValueError, "sparsity: expected a number in [0, 1], got 1.5"),
    ('select(sparsity=float("nan"))', ValueError, "sparsity: expected a finite number, got nan"),
    ('select(sparsity=float("inf"))', ValueError, "sparsity: expected a finite number, got inf"),
    ('select(sparsity="0.5")', TypeError, "sparsity: expected a number, got '0.5'"),
    ("select(sparsity=True)", TypeError, "sparsity: expected a number, got True"),
    ("select(keep_frames=2)", ValueError,
     "keep_frames: expected at least sink_frames + near_frames = 3, got 2"),
    ("select(sink_frames=-1)", ValueError, "sink_frames: expected 0 or more, got -1"),
    ("select(keep_frames=-1)", ValueError, "keep_frames: expected 0 or more, got -1"),
    ("select(near_frames=1.5)", TypeError, "near_frames: expected an integer, got 1.5"),
    ("select(sink_frames=2**63)", ValueError,
     "sink_frames: expected 0 or more, got 9223372036854775808"),
    ('select(score="max")', ValueError, "score: expected 'mean', 'mass' or 'lse', got 'max'"),
    ("select(score=3)", TypeError, "score: expected 'mean', 'mass' or 'lse', got 3"),
    ("select(hierarchy=1)", TypeError, "hierarchy: expected True or False, got 1"),
    ("attend(scale=0.0)", ValueError, "scale: expected a finite number above 0, got 0.0"),
    ("attend(scale=-1)", ValueError, "scale: expected a finite number above 0, got -1"),
    ('attend(scale=float("nan"))', ValueError, "scale: expected a finite number, got nan"),
    ('select(score="mass", scale=float("inf"))', ValueError,
     "scale: expected a finite number, got inf"),
    ("attend(scale=1e300)", ValueError, "scale: expected a finite number above 0, got 1e+300"),
    ('attend(scale="1")', TypeError, "scale: expected a number, got '1'"),
    ("lf.set_num_threads(-1)", ValueError, "threads: expected 0 to 1024, got -1"),
    ("lf.plan_selection(0, 3, 4, sparsity=0.5)", ValueError, "q_frames: expected 1 or more, got 0"),
    ("lf.plan_selection(4, 3, 4, sparsity=0.5)", ValueError,
     "k_frames: expected 4 to 2147483647, got 3"),
    # ---- outputs and means
    ("attend(out=f(1, 9, 2, 16))", ValueError, "out: dimension 1 (Lq) is 9, but q has Lq = 8"),
    ("attend(out=f(*Q, dtype=torch.half))", TypeError, "out: expected float32, got float16"),
    ("attend(out=readonly(Q))", ValueError, "out: expected writable memory, got a read-only array"),
    ("attend(out=Producer(np.ones(Q), flags=READ_ONLY))", ValueError,
     "out: expected writable memory, got a read-only array"),
    ("attend(out=torch._neg_view(f(*Q)))", ValueError,
     "out: expected plain values, got a lazy negative or conjugate view"),
    ("compress(out=torch._neg_view(f(1, 6, 2, 16)))", ValueError,
     "out: expected plain values, got a lazy negative or conjugate view"),
    ("attend(out=q)", ValueError, "out: expected memory apart from that of q, got an overlap"),
    ("attend(out=[])", TypeError,
     "out: expected a torch tensor, a NumPy array or an object with __dlpack__, got list"),
    ("compress(out=f(1, 5, 2, 16))", ValueError,
     "out: dimension 1 (J) is 5, but x, in blocks, has J = 6"),
    ("compress(out=f(1, 6, 2, 16, dtype=torch.bfloat16))", TypeError,
     "out: expected float32, got bfloat16"),
    ("select(k_means=f(1, 3, 2, 16))", ValueError,
     "k_means: expected 4 means (64-token blocks of the 4 past frames) or 6 (of all frames), ...3"),
    ("select(k_means=f(1, 4, 2, 16, dtype=torch.bfloat16))", TypeError,
     "k_means: expected float32, got bfloat16"),
    ("select(k_means=f(1, 4, 3, 16))", ValueError,
     "k_means: dimension 2 (H) is 3, but q has H = 2"),
    ("select(k_means=f(4, 2, 16))", ValueError,
     "k_means: expected 4 dimensions (B, J, H, D), got 3"),
    # ---- block lists
    ("attend_list([[0, 2, 6]])", ValueError, "indices: expected key blocks 0 to 5, got 6 (row 0)"),
    ("attend_list([[-1, 2, 3]])", ValueError,
     "indices: expected key blocks 0 to 5, got -1 (row 0)"),
    ("attend_list([[0, 3, 2]])", ValueError,
     "indices: expected an ascending row without repeats, got 2 after 3 (row 0)"),
    ("attend_list([[0, 3, 3]])", ValueError,
     "indices: expected an ascending row without repeats, got 3 after 3 (row 0)"),
    ("attend_list(counts=4)", ValueError, "counts: expected 0 to Kmax = 3, got 4 (row 0)"),
    ("attend_list(counts=-1)", ValueError, "counts: expected 0 to Kmax = 3, got -1 (row 0)"),
    ("attend_list(q_len=9)", ValueError,
     "blocks: were made for Lq = 9 and Lk = 24, but q has Lq = 8 and k has Lk = 24"),
    ("attend_list(k_len=28)", ValueError,
     "blocks: were made for Lq = 8 and Lk = 28, but q has Lq = 8 and k has Lk = 24"),
    ("attend(blocks=KEEP)", TypeError, "blocks: expected a BlockList or None, got ...ndarray..."),
    ("blocks(k_len=25)", ValueError,
     "k_len: expected whole frames of 4 tokens (frame_tokens), got 25"),
    ("blocks(q_len=0)", ValueError, "q_len: expected 1 or more, got 0"),
    ("blocks(block_k=48)", ValueError, "block_k: expected 16, 32, 64 or 128, got 48"),
    ("blocks(block_q=256)", ValueError, "block_q: expected 16 to 128, got 256"),
    ("blocks(frame_tokens=True)", TypeError, "frame_tokens: expected an integer, got True"),
    ("blocks(q_len=40)", ValueError,
     "indices: expected R = 3 query blocks (ceil(q_len / block_q)), got 1"),
    ("lists((2, 1, 3), (2, 1))", ValueError, "indices: expected 4 dimensions, got 3"),
    ("lists((1, 2, 1, 3), (1, 1, 1))", ValueError,
     "counts: expected the first three sizes of indices, (1, 2, 1), got (1, 1, 1)"),
    ("attend(blocks=lists((1, 2, 1, 1), (1, 2, 1), np.int64))", TypeError,
     "indices: expected int32, got ...int64"),
    ("attend(blocks=lists((1, 3, 1, 1), (1, 3, 1)))", ValueError,
     "indices: dimension 1 (H) is 3, but q has H = 2"),
    ("blocks([[0, 9]]).to_bool()", ValueError,
     "indices: expected key blocks 0 to 5, got 9 (row 0)"),
    ("blocks(counts=9).to_csr()", ValueError, "counts: expected 0 to Kmax = 3, got 9 (row 0)"),
    ("from_bool(KEEP.astype(int))", TypeError,
     "mask: expected a NumPy array of bool, got dtype('int64')"),
    ("from_bool(KEEP[0])", ValueError, "mask: expected 4 dimensions, got 3"),
    ("from_bool(KEEP[..., :5])", ValueError, "mask: expected J = 6 key blocks, got 5"),
    # ---- schedules
    ("schedule(sparsity=1.0)", ValueError, "sparsity: expected a number in [0, 1), got 1.0"),
    ("schedule(sparsity=-0.5)", ValueError, "sparsity: expected a number in [0, 1), got -0.5"),
    ('schedule(sparsity=float("nan"))', ValueError, "sparsity: expected a finite number, got nan"),
    ('schedule(sparsity="high")', TypeError, "sparsity: expected a number, got 'high'"),
    ("schedule(sparsity=0.8, base=0.7)", ValueError,
     "base: expected a number from sparsity = 0.8 to 1, got 0.7"),
    ("schedule(sparsity=0.8, base=1.1)", ValueError,
     "base: expected a number from sparsity = 0.8 to 1, got 1.1"),
    ('schedule(base=float("nan"))', ValueError, "base: expected a finite number, got nan"),
    ('schedule(law="cubic")', ValueError,
     "law: expected 'linear', 'exponential', 'constant' or 'count', got 'cubic'"),
    ("schedule(law=None)", TypeError,
     "law: expected 'linear', 'exponential', 'constant' or 'count', got None"),
    ("schedule(0)", ValueError, "num_frames: expected 1 or more, got 0"),
    ("schedule(10**9)", ValueError, "num_frames: expected 1 to 10000000, got 1000000000"),
    ("schedule(21.0)", TypeError, "num_frames: expected an integer, got 21.0"),
    ("schedule(21, 0)", ValueError, "frames_per_chunk: expected 1 or more, got 0"),
    ("schedule(21, True)", TypeError, "frames_per_chunk: expected an integer, got True"),
    ("schedule(window=0)", ValueError, "window: expected 1 or more, got 0"),
    ('schedule(window="12")', TypeError, "window: expected an integer, got '12'"),
    ("schedule(dense_frames=-1)", ValueError, "dense_frames: expected 0 or more, got -1"),
    ("schedule(chunk_ends=[3, 9, 6])", ValueError,
     "chunk_ends: expected ascending frame counts above 0, got 6 at place 2"),
    ("schedule(chunk_ends=[3, 3])", ValueError,
     "chunk_ends: expected ascending frame counts above 0, got 3 at place 1"),
    ("schedule(chunk_ends=[0, 3])", ValueError,
     "chunk_ends: expected ascending frame counts above 0, got 0 at place 0"),
    ("schedule(chunk_ends=[])", ValueError, "chunk_ends: expected a list of integers, got []"),
    ("schedule(chunk_ends=[3.5, 6.0])", ValueError,
     "chunk_ends: expected a list of integers, got [3.5, 6.0]"),
    ("lf.Schedule.given([0, 1.2])", ValueError,
     "schedule: expected numbers in [0, 1), got [0, 1.2]"),
    ('lf.Schedule.given([0, float("nan")])', ValueError,
     "schedule: expected numbers in [0, 1), got [0, nan]"),
    ("lf.Schedule.given([])", ValueError, "schedule: expected a list of numbers, got []"),
    ("lf.Schedule.given([0, 0.5], chunk_ends=[3])", ValueError,
     "chunk_ends: expected one for each of the 2 values, got 1"),
]  # fmt: skip


@pytest.mark.parametrize("call, kind, message", BAD, ids=[row[0] for row in BAD])
def test_bad_calls_get_a_sentence(call, kind, message):
    with pytest.raises(Exception) as caught:
        eval(call)
    text = str(caught.value)
    assert type(caught.value) is kind, f"{caught.type.__name__}: {text}"
    expected = ".*".join(map(re.escape, message.split("...")))
    assert re.fullmatch(expected, text), f"expected {message!r}, got {text!r}"  # one line


def test_the_table_is_long_enough():
    assert len({row[0] for row in BAD}) == len(BAD) >= 60


# ---- what looks odd and is right ------------------------------------------------------


@pytest.mark.parametrize(
    "producer",
    [
        Producer,
        Old,
        Shared,
        lambda x: Producer(x, strides=None),
        lambda x: Old(x, strides=None),
        lambda x: Producer(x, flags=READ_ONLY),
        lambda x: Producer(x, version=(1, 9)),
    ],
    ids=["versioned", "old", "shared", "no strides", "old, no strides", "read-only", "1.9"],
)
def test_every_good_producer_is_read(producer):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in (Q, K, K)]
    made = [producer(x) for x in arrays]
    expected = lf.block_sparse_attention(*arrays)
    np.testing.assert_array_equal(np.asarray(lf.block_sparse_attention(*made)), expected)
    means = np.asarray(lf.compress(made[1], T, block=16))
    np.testing.assert_array_equal(means, lf.compress(arrays[1], T, block=16))
    options = dict(frame_tokens=T, sparsity=0.5, block_k=16)
    chosen = lf.select_blocks(*made[:2], **options)
    expected = lf.select_blocks(*arrays[:2], **options)
    np.testing.assert_array_equal(np.asarray(chosen.indices), expected.indices)


def test_byte_offsets_and_strides_are_honoured():
    big = np.random.default_rng(0).standard_normal((1, 30, 3, 20)).astype(np.float32)
    view = big[:, 3:27, 1:3, 4:]
    said = Producer(
        big,
        shape=list(K),
        strides=[s // 4 for s in view.strides],
        byte_offset=view.ctypes.data - big.ctypes.data,
    )
    np.testing.assert_array_equal(
        np.asarray(lf.compress(said, T, block=16)), lf.compress(view, T, block=16)
    )
    once = Producer(array, strides=[0, 0, 16, 1])  # every token is the first one
    assert (np.asarray(lf.compress(once, T, block=16)) == 1).all()
    lone = Producer(array, strides=[-77, 32, 16, 1])  # of a size-1 dimension: anything goes
    assert (np.asarray(lf.compress(lone, T, block=16)) == 1).all()


def test_an_output_producer_is_written():
    out = Producer(np.zeros(Q))
    assert lf.block_sparse_attention(q, k, v, out=out) is out
    assert (out.array == 1).all()


def test_an_output_that_exports_a_copy_stays_alive_while_written():
    class Copy(Shared):
        def __dlpack__(self, **keywords):
            return self.array.copy().__dlpack__(**keywords)

    for _ in range(20):  # the sanitizer build sees a write after free
        out = Copy(np.zeros(Q, np.float32))
        assert lf.block_sparse_attention(q, k, v, out=out) is out
        assert (out.array == 0).all()


def test_an_output_lies_over_nothing_else():
    shared = np.zeros((1, 20, 2, 16), np.float32)
    keys, means = f(1, 24, 2, 16), np.zeros((1, 6, 2, 16), np.float32)
    with pytest.raises(
        ValueError, match="out: expected memory apart from that of q, got an overlap"
    ):
        lf.block_sparse_attention(shared[:, :12], keys, keys, out=shared[:, 8:])
    with pytest.raises(
        ValueError, match="out: expected memory apart from that of x, got an overlap"
    ):
        lf.compress(shared[:, :8], 4, block=4, out=shared[:, 2:4])
    with pytest.raises(ValueError, match="out: expected a place for every element, got strides"):
        lf.compress(keys, 4, block=4, out=torch.zeros(1, 1, 2, 16).expand(1, 6, 2, 16))
    copied = Producer(means, version=(1, 3), flags=2)
    with pytest.raises(ValueError, match="out: expected memory to write in place, got a copy"):
        lf.compress(keys, 4, block=4, out=copied)


def test_a_forked_child_computes():
    import os

    keys = f(1, 24, 2, 16)
    expected = lf.compress(keys, 4, block=4)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(lf.compress(keys, 4, block=4), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_empty_batches_and_heads_are_empty_results():
    for shape in (0, 2), (1, 0):
        q, k = f(shape[0], 8, shape[1], 16), f(shape[0], 24, shape[1], 16)
        assert lf.block_sparse_attention(q, k, k).shape == q.shape
        assert lf.compress(k, T, block=16).shape == (shape[0], 6, shape[1], 16)
        chosen = lf.select_blocks(q, k, frame_tokens=T, sparsity=0.5, block_k=16)
        assert tuple(chosen.indices.shape) == (shape[0], shape[1], 1, 3)
        assert chosen.density in (0.0, 0.5)
        assert lf.block_sparse_attention(q, k, k, chosen).shape == q.shape
    assert lf.compress(f(1, 0, 2, 16), T).shape == (1, 0, 2, 16)


def test_without_grad_mode_parameters_are_read():
    with torch.no_grad():
        assert (lf.compress(torch.nn.Parameter(k), T, block=16) == 1).all()
    with torch.inference_mode():
        assert (lf.block_sparse_attention(q.clone(), k.clone(), v.clone()) == 1).all()


def test_numpy_integers_are_integers():
    lf.compress(k, np.int64(T), block=np.int32(16))
    lf.select_blocks(q, k, frame_tokens=np.int16(T), sparsity=np.float32(0.5), block_k=np.int64(16))


def test_an_error_leaves_the_next_call_alone():
    for _ in range(3):
        with pytest.raises(OSError):
            lf.compress(Producer(array, error=OSError("gone")), T)
        assert (lf.compress(k, T) == 1).all()


# ---- forward-mode derivatives ------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_dual_tensors_are_refused():
    """A tangent is not dropped in silence, whatever torch.no_grad() says; primals are taken."""
    ahead = torch.autograd.forward_ad
    q, k, v, out = (torch.ones(x) for x in (Q, K, K, Q))
    given = {"q": q, "k": k, "v": v, "out": out}
    expected = lf.block_sparse_attention(q, k, v)
    with ahead.dual_level(), torch.no_grad():
        assert torch.equal(lf.block_sparse_attention(**given), expected)
        for name, x in given.items():
            dual = ahead.make_dual(x, torch.ones_like(x))
            with pytest.raises(ValueError, match=f"^{name}: expected a tensor without .*tangent"):
                lf.block_sparse_attention(**(given | {name: dual}))
            primal = ahead.unpack_dual(dual).primal
            lf.block_sparse_attention(**(given | {name: primal}))
        dual = ahead.make_dual(k, k)
        with pytest.raises(ValueError, match="^x: expected a tensor without a forward-mode"):
            lf.compress(dual, T)
        with pytest.raises(ValueError, match="^k: expected a tensor without a forward-mode"):
            lf.select_blocks(q, dual, frame_tokens=T, sparsity=0.5)
        import lightforcing.torch_ops  # noqa: F401

        with pytest.raises(ValueError, match="compress: expected tensors without a forward-mode"):
            torch.ops.lightforcing.compress(dual, T, 4)
    with pytest.raises(Exception, match="forward-mode|storage|lightforcing"):
        torch.func.jvp(lambda x: lf.block_sparse_attention(x, k, v), (q,), (q,))
