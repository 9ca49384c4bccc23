"""Steps, merges and errors through the base package, against float64, with the standard library alone."""

from __future__ import annotations

import math
import random
import threading
import time
import unittest

import treeattn
from support import INFINITY, attend, merge, numbers, tensor

HEADS, KV_HEADS, DIM = 4, 2, 8
NAN = math.nan


def on_ranks(world: int, call) -> list:
    """Calls `call(rank)` on a thread for each rank; their results, or what the first raised."""
    results: list = [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = call(rank)
        except Exception as error:  # handed to the test's own thread
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


class Steps(unittest.TestCase):
    def test_decode_over_ranks_of_which_one_is_empty_is_attention_over_all_keys(self) -> None:
        generator = random.Random(1)
        counts = [5, 0, 9]
        q = numbers(generator, HEADS * DIM, 2)
        keys = [numbers(generator, count * KV_HEADS * DIM) for count in counts]
        values = [numbers(generator, count * KV_HEADS * DIM) for count in counts]
        comms = treeattn.Comm.local([treeattn.cpu()] * 3, threads_per_rank=1)
        plans = treeattn.Plan.all(comms, q_heads=HEADS, kv_heads=KV_HEADS, head_dim_qk=DIM, max_batch=1, max_query_tokens=1,
                                  max_kv_length=16)  # fmt: skip

        def step(rank: int):
            shape = (1, max(counts[rank], 1), KV_HEADS, DIM)
            room = [0.0] * (math.prod(shape) - len(keys[rank]))
            out, lse = tensor((1, HEADS, DIM)), tensor((1, HEADS))
            plans[rank].decode(tensor((1, HEADS, DIM), q), tensor(shape, keys[rank] + room), tensor(shape, values[rank] + room), out,
                               lse, kv_length=tensor((1,), [counts[rank]], "i"))  # fmt: skip
            return out.tolist()[0], lse.tolist()[0]

        results = on_ranks(3, step)
        self.assertEqual(results[0], results[1])
        self.assertEqual(results[0], results[2])
        out, lse = results[0]
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)

            def rows(shards: list[list[float]]) -> list[list[float]]:
                joined = [x for shard in shards for x in shard]
                return [joined[i + kv * DIM : i + (kv + 1) * DIM] for i in range(0, len(joined), KV_HEADS * DIM)]

            truth, truth_lse = attend(q[head * DIM : (head + 1) * DIM], rows(keys), rows(values), 1 / math.sqrt(DIM))
            self.assertAlmostEqual(lse[head], truth_lse, delta=2e-6)
            for found, wanted in zip(out[head], truth):
                self.assertAlmostEqual(found, wanted, delta=2e-6)

    def test_one_thread_drives_all_ranks_by_streams(self) -> None:
        comms = treeattn.Comm.local([treeattn.cpu()] * 2, threads_per_rank=1)
        plans = treeattn.Plan.all(comms, q_heads=1, kv_heads=1, head_dim_qk=2, max_batch=1, max_query_tokens=1, max_kv_length=4)
        keys = [tensor((1, 2, 1, 2), [1, 2, 3, 4]), tensor((1, 1, 1, 2), [5, 6])]
        values = [tensor((1, 2, 1, 2), [3, 0, 6, 3]), tensor((1, 1, 1, 2), [9, 9])]
        outs, lengths = [tensor((1, 1, 2)) for _ in range(2)], [tensor((1,), [n], "i") for n in (2, 1)]
        q, streams = tensor((1, 1, 2)), [treeattn.Stream() for _ in range(2)]
        for rank in range(2):
            plans[rank].decode(q, keys[rank], values[rank], outs[rank], kv_length=lengths[rank], stream=streams[rank])
        for stream in streams:
            stream.synchronize()
        self.assertEqual([out.tolist() for out in outs], [[[[6.0, 4.0]]]] * 2)
        self.assertEqual(plans[0].stats()["steps"], 1)


class Tensors(unittest.TestCase):
    """What is said of tensors before the library sees their addresses."""

    SHAPE = {"q_heads": 2, "kv_heads": 1, "head_dim_qk": 2, "max_batch": 2, "max_query_tokens": 2, "max_kv_length": 3}

    def step(self, shape: dict, **fields: object) -> list:
        (comm,) = treeattn.Comm.local([treeattn.cpu()], threads_per_rank=1)
        plan = comm.plan(**self.SHAPE | shape)
        q, out = tensor((2, 2, 2), [1, 0, 0, 1, 1, 1, 2, 0]), tensor((2, 2, 2))
        k = tensor((2, 3, 1, 2), [1, 2, 3, 4, 5, 6, 1, 0, 0, 1, 1, 1])
        plan.decode(q, k, k, out, kv_length=tensor((2,), [3, 3], "i"), **fields)
        return out.tolist()

    def test_masks_and_scales_broadcast(self) -> None:
        whole = tensor((2, 2, 1, 3), [0, 0, -INFINITY] * 4)
        wanted = self.step({"mask": "additive", "mask_dtype": "float32"}, mask=whole)
        self.assertNotEqual(self.step({}), wanted)
        for shape in ((1, 1, 1, 3), (1, 1, 3), (3,)):
            mask = tensor(shape, [0, 0, -INFINITY])
            self.assertEqual(self.step({"mask": "additive", "mask_dtype": "float32"}, mask=mask), wanted)
        wanted = self.step({}, v_scale=tensor((2, 3, 1), [2] * 6))
        for shape in ((1,), (1, 1, 1), (2, 1, 1), (3, 1)):
            self.assertEqual(self.step({}, v_scale=tensor(shape, [2] * math.prod(shape))), wanted)

    def test_tensors_of_other_shapes_are_refused(self) -> None:
        for fields, wanted in (
            ({"v_scale": tensor((2,), [1, 1])}, r"v_scale is \[2\]; wanted 1 heads"),
            ({"v_scale": tensor((1, 1, 1, 1), [1])}, "wanted at most 3 dimensions"),
        ):
            with self.assertRaisesRegex(ValueError, wanted):
                self.step({}, **fields)
        with self.assertRaisesRegex(TypeError, "sinks is int32; wanted float32"):
            self.step({"sinks": 1}, sinks=tensor((2,), [1, 1], "i"))
        with self.assertRaisesRegex(ValueError, r"k is \[2, 3, 1, 2\]; wanted \[any, any, 2, 2\]"):
            self.step({"kv_heads": 2})


class Merges(unittest.TestCase):
    """The conventions of other kernels: what an lse of no keys is, its base, and how it lies in memory."""

    TOKENS = 3

    def partial(self, seed: int) -> tuple[list[float], list[float]]:
        generator = random.Random(seed)
        rows = self.TOKENS * HEADS
        return numbers(generator, rows * DIM), numbers(generator, rows, 3)

    def check(self, empty: float, flags: int, base: int, transposed: bool, empty_output: float = NAN) -> None:
        rows = self.TOKENS * HEADS
        partials = [self.partial(seed) for seed in range(3)]
        # Row 1 has no keys on rank 0, row 2 on no rank.
        for rank, (o, lse) in enumerate(partials):
            for row in [2] + ([1] if rank == 0 else []):
                lse[row] = empty
                o[row * DIM : (row + 1) * DIM] = [empty_output] * DIM
        comms = treeattn.Comm.local([treeattn.cpu()] * 3, threads_per_rank=1)
        plans = treeattn.Plan.all(comms, q_heads=HEADS, kv_heads=0, head_dim_v=DIM, max_query_tokens=self.TOKENS)
        factor = 1 if base == 0 else 1 / math.log(2)

        def step(rank: int):
            o, lse = partials[rank]
            lse = tensor((rows,), [x * factor for x in lse]).tolist()
            if transposed:
                lse = [lse[token * HEADS + head] for head in range(HEADS) for token in range(self.TOKENS)]
            held = tensor((rows,), lse)
            strided = treeattn.view(held)
            strided.shape = (self.TOKENS, HEADS)
            strided.stride = (4, 4 * self.TOKENS) if transposed else (4 * HEADS, 4)
            out, out_lse = tensor((self.TOKENS, HEADS, DIM)), tensor((self.TOKENS, HEADS))
            plans[rank].merge(tensor((self.TOKENS, HEADS, DIM), o), strided, out, out_lse, lse_base=base, flags=flags)
            return out.tolist(), out_lse.tolist()

        for out, out_lse in on_ranks(3, step):
            for row in range(rows):
                token, head = divmod(row, HEADS)
                live = [(o[row * DIM : (row + 1) * DIM], -INFINITY if lse[row] == empty else lse[row]) for o, lse in partials]
                wanted, wanted_lse = merge(live, DIM)
                if wanted_lse == -INFINITY:
                    self.assertEqual(out_lse[token][head], -INFINITY)
                    self.assertEqual(out[token][head], [0.0] * DIM)
                    continue
                self.assertAlmostEqual(out_lse[token][head], wanted_lse, delta=3e-6)
                for a, b in zip(out[token][head], wanted):
                    self.assertAlmostEqual(a, b, delta=3e-6)

    def test_minus_infinity_is_empty(self) -> None:
        self.check(-INFINITY, 0, 0, False)

    def test_plus_infinity_is_empty_where_the_flag_says_so(self) -> None:
        self.check(INFINITY, treeattn.MERGE_PLUS_INF_IS_EMPTY, 0, False)

    def test_base_two(self) -> None:
        self.check(-INFINITY, 0, 2, False)

    def test_lse_by_heads_first(self) -> None:
        self.check(-INFINITY, 0, 0, True)

    def test_all_of_it(self) -> None:
        self.check(INFINITY, treeattn.MERGE_PLUS_INF_IS_EMPTY, 2, True)

    def test_nan_reaches_its_own_row_and_no_other(self) -> None:
        partials = [self.partial(seed) for seed in range(2)]
        partials[1][1][5] = NAN
        o = tensor((2, self.TOKENS, HEADS, DIM), partials[0][0] + partials[1][0])
        lse = tensor((2, self.TOKENS, HEADS), partials[0][1] + partials[1][1])
        out, out_lse = tensor((self.TOKENS, HEADS, DIM)), tensor((self.TOKENS, HEADS))
        treeattn.default_runtime().merge_partials(o, lse, out, out_lse)
        for row in range(self.TOKENS * HEADS):
            token, head = divmod(row, HEADS)
            self.assertEqual(math.isnan(out_lse.tolist()[token][head]), row == 5)
            self.assertEqual([math.isnan(x) for x in out.tolist()[token][head]], [row == 5] * DIM)


class Errors(unittest.TestCase):
    SHAPE = {"q_heads": 1, "kv_heads": 1, "head_dim_qk": 2, "max_batch": 1, "max_query_tokens": 1, "max_kv_length": 4}

    def tensors(self) -> tuple:
        return tensor((1, 1, 2)), tensor((1, 2, 1, 2)), tensor((1, 2, 1, 2)), tensor((1, 1, 2))

    def test_refused_argument_is_a_value_error_with_its_code(self) -> None:
        (comm,) = treeattn.Comm.local([treeattn.cpu()])
        plan = comm.plan(**self.SHAPE)
        with self.assertRaisesRegex(ValueError, "query_tokens: found 7") as caught:
            plan.decode(*self.tensors(), kv_length=tensor((1,), [2], "i"), query_tokens=7)
        self.assertIsInstance(caught.exception, treeattn.Error)
        self.assertEqual((caught.exception.code, caught.exception.name), (treeattn.ERROR_INVALID_ARGUMENT, "INVALID_ARGUMENT"))

    def test_bad_data_names_the_sequence_and_the_rank_and_makes_nan(self) -> None:
        (comm,) = treeattn.Comm.local([treeattn.cpu()])
        plan = comm.plan(**self.SHAPE)
        tensors = self.tensors()
        with self.assertRaises(treeattn.InvalidDataError) as caught:
            plan.decode(*tensors, kv_length=tensor((1,), [-1], "i"))
        self.assertIn("kv_length", str(caught.exception))
        self.assertTrue(all(math.isnan(x) for x in tensors[3].tolist()[0][0]))
        self.assertFalse(comm.status()["broken"])

    def test_rank_that_does_not_come_is_named(self) -> None:
        comms = treeattn.Comm.local([treeattn.cpu()] * 2, step_timeout_ns=50_000_000)
        plans = treeattn.Plan.all(comms, **self.SHAPE)
        with self.assertRaises(TimeoutError) as caught:
            plans[0].decode(*self.tensors(), kv_length=tensor((1,), [2], "i"))
        self.assertIsInstance(caught.exception, treeattn.Error)
        self.assertEqual((caught.exception.code, caught.exception.rank), (treeattn.ERROR_TIMEOUT, 1))
        self.assertTrue(comms[1].status()["broken"])

    def test_closed_objects_are_bad_handles(self) -> None:
        (comm,) = treeattn.Comm.local([treeattn.cpu()])
        comm.close()
        comm.close()
        with self.assertRaises(treeattn.BadHandleError):
            comm.status()

    def test_tensors_of_the_wrong_type_are_refused_before_the_library_sees_them(self) -> None:
        (comm,) = treeattn.Comm.local([treeattn.cpu()])
        plan = comm.plan(**self.SHAPE)
        q, k, v, out = self.tensors()
        with self.assertRaisesRegex(TypeError, "q is int32"):
            plan.decode(tensor((1, 1, 2), kind="i"), k, v, out, kv_length=tensor((1,), [2], "i"))
        with self.assertRaisesRegex(TypeError, "kv_length is float32"):
            plan.decode(q, k, v, out, kv_length=tensor((1,), [2]))

    def test_what_a_transport_raises_is_the_cause(self) -> None:
        def broken(*_: int) -> int:
            raise OSError("the wire is cut")

        with self.assertRaises(treeattn.TransportError) as caught:
            treeattn.Comm.from_transport(broken, 2, 0)
        self.assertIsInstance(caught.exception.__cause__, OSError)

    def test_transport_that_returns_late_is_a_timeout(self) -> None:
        def late(send: int, recv: int, size: int, timeout_ns: int, abort: int) -> int:
            time.sleep(timeout_ns / 1e9)
            return 1

        with self.assertRaises(treeattn.TimeoutError):
            treeattn.Comm.from_transport(late, 2, 0, setup_timeout_ns=20_000_000)


class Buffers(unittest.TestCase):
    def test_what_is_uploaded_comes_back(self) -> None:
        buffer = treeattn.Buffer(16)
        buffer.upload(bytearray(b"0123"), 4)
        target = bytearray(16)
        buffer.download(target)
        self.assertEqual(bytes(target), b"\0\0\0\x000123" + bytes(8))
        self.assertEqual(treeattn.view(buffer).bytes, 16)

    def test_placement_and_heads(self) -> None:
        self.assertEqual([treeattn.head_range(8, 3, rank) for rank in range(3)], [(0, 2), (2, 3), (5, 3)])
        placement = treeattn.Placement("interleaved", 2, world=2)
        self.assertEqual([placement.local_length(rank, 7) for rank in range(2)], [4, 3])
        self.assertEqual((placement.owner(7, 2), placement.local_slot(7, 2), placement.global_position(1, 7, 0)), (1, 0, 2))


if __name__ == "__main__":
    unittest.main()
