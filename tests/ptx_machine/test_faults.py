"""Every kind of fault, planted in a kernel, is caught; the same kernel without it runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx_machine import Fault, Options
from ptx_machine.counters import Counters
from ptx_machine.machine import ORDERS, run

KERNEL = """
.version 8.7
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<30>;
    .reg .b64 %d<9>;
    ld.param.b64 %d1, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mul.wide.u32 %d2, %r1, 4;
    add.s64 %d3, %d1, %d2;      // %d3: the thread's element of the tensor
    shl.b32 %r3, %r1, 2;
    mov.b32 %r4, smem;
    add.s32 %r5, %r4, %r3;      // %r5: the thread's word of shared memory
{body}
    ret;
}}
"""


def execute(body: str, threads: int = 64, ctas: int = 1, elements: int = 256, tensor=None, counters=None, **options):
    """Runs the lines of a kernel that gets one tensor, of int32 unless given; returns the tensor."""
    tensor = torch.arange(elements, dtype=torch.int32) if tensor is None else tensor
    run(KERNEL.format(threads=threads, body=body), (ctas, 1, 1), [("x", tensor)], 4096, Options(**options), counters)
    return tensor


def in_every_order(body: str, **arguments) -> torch.Tensor:
    results = [execute(body, order=order, seed=3, **arguments) for order in ORDERS]
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]


def caught(body: str, match: str, **arguments) -> None:
    """The fault is found in whatever order the warps run."""
    for order in ORDERS:
        with pytest.raises(Fault, match=match):
            execute(body, order=order, **arguments)


def exchange(mask: int, between: str) -> str:
    """Every thread stores its number in shared memory, and reads that of another: its own number, xor ``mask``."""
    return f"""
    st.shared.b32 [%r5], 0;
    bar.sync 0;
    st.shared.b32 [%r5], %r1;
    {between}
    xor.b32 %r6, %r3, {4 * mask};
    add.s32 %r7, %r4, %r6;
    ld.shared.b32 %r8, [%r7];
    st.global.b32 [%d3], %r8;
"""


def test_a_race_between_warps_in_shared_memory():
    caught(exchange(32, ""), "race on shared memory.* no barrier")
    assert in_every_order(exchange(32, "bar.sync 0;"))[:64].tolist() == [n ^ 32 for n in range(64)]
    caught(exchange(32, "bar.warp.sync -1;"), "race")


def test_a_race_within_a_warp():
    caught(exchange(1, ""), "race on shared memory")
    for between in ("bar.warp.sync -1;", "bar.sync 0;", "shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;"):
        assert in_every_order(exchange(1, between))[:64].tolist() == [n ^ 1 for n in range(64)]


HALVES = """
    and.b32 %r10, %r1, 16;
    setp.ne.b32 %p1, %r10, 0;
    @%p1 bra $UPPER;
    bar.warp.sync 0xffff;
    bra.uni $MET;
$UPPER:
    bar.warp.sync 0xffff0000;
$MET:
"""


def test_halves_of_a_warp_that_synchronise():
    assert in_every_order(exchange(1, HALVES))[:64].tolist() == [n ^ 1 for n in range(64)]
    caught(exchange(16, HALVES), "race on shared memory")  # the partner is in the other half


def test_a_warp_barrier_that_a_thread_never_reaches():
    skip = "setp.eq.b32 %p1, %r1, 5;\n @%p1 bra $END;\n bar.warp.sync -1;\n$END:\n st.global.b32 [%d3], %r1;"
    caught(skip, "divergent warp barrier: thread 0 .* waits")
    execute(skip.replace("-1", "0xffffffdf"), threads=32)


# Each thread stores what the thread 32 places away has, which is in another warp.
SWAP = """
    xor.b32 %r6, %r1, 32;
    mul.wide.u32 %d4, %r6, 4;
    add.s64 %d5, %d1, %d4;
    ld.global.b32 %r7, [%d5];
    {between}
    st.global.b32 [%d3], %r7;
"""


def test_a_race_in_global_memory():
    caught(SWAP.format(between=""), r"race on x, element \d+ of 4 bytes: thread \d+ of CTA 0 (reads|writes) it")
    assert in_every_order(SWAP.format(between="bar.sync 0;"))[:64].tolist() == [n ^ 32 for n in range(64)]


def test_what_a_race_does_to_the_numbers():
    """Without the check the kernel runs, and what it stores depends on which warp was first."""
    body = SWAP.format(between="")
    first, last, together = (
        execute(body, order=order, races=False)[:64].tolist() for order in ("forward", "backward", "interleaved")
    )
    assert together == [n ^ 32 for n in range(64)]  # all read before any writes
    assert first == [*range(32, 64)] * 2 and last == [*range(32)] * 2


def test_a_race_between_ctas():
    place = "mad.lo.s32 %r6, %r2, {stride}, %r1;\n mul.wide.u32 %d4, %r6, 4;\n add.s64 %d5, %d1, %d4;\n"
    stores = place + "st.global.b32 [%d5], %r2;"
    caught(stores.format(stride=63), "race between CTAs on x, element", ctas=3)
    assert in_every_order(stores.format(stride=64), ctas=3)[:192].tolist() == [n // 64 for n in range(192)]
    reads = "ld.global.b32 %r7, [%d1+400];\n bar.sync 0;\n" + stores
    caught(reads.format(stride=64), "race between CTAs on x, element 100", ctas=3)
    execute(reads.format(stride=64), ctas=3, races_between_ctas=False)
    many = 8192 // 64 + 1  # CTAs of two batches
    caught(stores.format(stride=0), "race between CTAs", ctas=many)


def test_an_access_out_of_bounds():
    caught("ld.global.b32 %r6, [%d3+800];", "out of bounds: thread 56 .* byte 1024 of x, which has 1024", elements=256)
    execute("ld.global.b32 %r6, [%d3+768];", elements=256)
    caught("ld.global.b32 %r6, [%d3+-4];", "out of bounds: thread 0 .* below every storage")
    caught("ld.shared.b32 %r6, [%r5+3972];", "thread 31 .* byte 4096 of 4096 bytes of shared memory", threads=32)
    caught("ld.global.b32 %r6, [%d8];", "out of bounds.* near no storage")  # a register that was never written


def test_a_misaligned_vector():
    load = "setp.eq.b32 %p1, %r1, 0;\n @%p1 ld.global.v4.b32 {{%r6, %r7, %r8, %r9}}, [%d3+{offset}];"
    caught(load.format(offset=8), "misaligned: thread 0 of CTA 0 accesses 16 bytes")
    execute(load.format(offset=16))


def test_shared_memory_that_nobody_has_written():
    caught("ld.shared.b32 %r6, [%r5];", "reads shared memory that nobody has written")
    execute("st.shared.b32 [%r5], %r1;\n ld.shared.b32 %r6, [%r5];")
    caught("st.shared.b16 [%r5], %h1;\n ld.shared.b32 %r6, [%r5];", "nobody has written")


def test_threads_that_miss_a_barrier():
    skip = "setp.gt.u32 %p1, %r1, 40;\n @%p1 bra $END;\n bar.sync 0;\n$END:\n st.global.b32 [%d3], %r1;"
    caught(skip, "divergent barrier: thread 0 of CTA 0 waits .* has left the kernel")
    caught("setp.gt.u32 %p1, %r1, 40;\n @%p1 ret;\n bar.sync 0;", "divergent barrier.* thread 41 .* left the kernel")
    two = "setp.gt.u32 %p1, %r1, 31;\n @%p1 bra $B;\n bar.sync 0;\n bra $END;\n$B:\n bar.sync 0;\n$END:\n"
    caught(two, "divergent barrier: .* waits elsewhere")
    whole = "setp.gt.u32 %p1, %r2, 0;\n @%p1 bra $B;\n bar.sync 0;\n bra $END;\n$B:\n bar.sync 0;\n$END:\n"
    execute(whole, ctas=2)  # each CTA takes one of the branches as a whole


def test_a_part_of_a_warp_in_a_shuffle():
    part = "setp.gt.u32 %p1, %r1, 7;\n @%p1 bra $END;\n shfl.sync.bfly.b32 %r6, %r1, {mask}, 31, {members};\n$END:\n"
    caught(part.format(mask=1, members=-1), "not all threads of a warp are here.* lanes 0xff, and it names 0xffffffff")
    execute(part.format(mask=1, members=0xFF), threads=32)
    caught(part.format(mask=8, members=0xFF), "reads from a thread that is not here", threads=32)


def test_stores_of_different_values():
    caught("st.global.b32 [%d1], %r1;", "two threads store different values on x, element 0")
    caught("st.shared.b32 [%r4], %r1;", "two threads store different values on shared memory")
    execute("st.global.b32 [%d1], 7;")  # the same value from all of them
    execute("st.global.b32 [%d1], 7;\n ld.global.b32 %r6, [%d1];")  # which each may read, having stored it
    caught("ld.global.b32 %r6, [%d1];\n st.global.b32 [%d1], 7;", "race")


def test_a_large_storage_is_checked_for_bounds_alone(monkeypatch):
    monkeypatch.setattr("ptx_machine.memory.TRACKED_BYTES", 512)
    execute("st.global.b32 [%d1], %r1;", elements=256)
    caught("ld.global.b32 %r6, [%d3+800];", "out of bounds", elements=256)


def test_a_storage_that_no_gpu_would_give():
    odd = torch.from_numpy(np.zeros(1025, np.uint8)[1:].view(np.int32))
    with pytest.raises(ValueError, match=r"the storage of x begins at .* clone it"):
        execute("", tensor=odd)


def test_poison_is_for_what_a_kernel_stores_to_and_never_reads():
    largest, store = 2**31 - 1, "st.global.b32 [%d3], 7;\n"
    assert execute(store, poison=True).tolist() == 64 * [7] + 192 * [largest]
    assert execute(store, poison=True, kept=frozenset({"x"}))[64:].tolist() == list(range(64, 256))
    for other in ("", "ld.global.b32 %r6, [%d3];\n" + store, "red.global.add.s32 [%d3], 0;\n" + store):
        assert execute(other, poison=True)[64:].tolist() == list(range(64, 256))


def test_an_unknown_order():
    with pytest.raises(ValueError, match="'sideways'"):
        execute("", order="sideways")


def test_a_kernel_that_does_not_end(monkeypatch):
    monkeypatch.setattr("ptx_machine.machine.STEPS", 1000)
    caught("$AGAIN:\n bra $AGAIN;", "does not end")


def test_an_unknown_instruction_is_named_before_anything_runs():
    tensor = torch.zeros(64, dtype=torch.int32)
    body = "st.global.b32 [%d3], 1;\n mma.sync.aligned.m16n8k8 {%r1}, {%r2}, {%r3}, {%r4};"
    with pytest.raises(NotImplementedError, match=r"PTX line \d+.*mma.sync.aligned.m16n8k8"):
        execute(body, tensor=tensor)
    assert not tensor.any()


@pytest.mark.parametrize(
    "body", ["mov.u32 %r6, %clock;", "add.rz.f32 %r6, %r7, %r8;", "bar.sync 1, 64;", "ld.b32 %r6, [%d3];", "trap;"]
)
def test_a_form_that_is_not_modelled_is_refused(body):
    with pytest.raises(NotImplementedError, match="PTX line"):
        execute(body)


@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_matrices_go_to_shared_memory_and_back(transposed):
    """Four 8x8 matrices; lane l gives the address of row l % 8 of matrix l // 8."""
    body = f"""
    shl.b32 %r6, %r1, 4;
    add.s32 %r7, %r4, %r6;
    ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%d6];
    stmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16 [%r7], {{%r10, %r11, %r12, %r13}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r14, %r15, %r16, %r17}}, [%r7];
    bar.warp.sync -1;
    st.global.v4.b32 [%d6], {{%r14, %r15, %r16, %r17}};
"""
    address = "mul.wide.u32 %d5, %r1, 16;\n add.s64 %d6, %d1, %d5;\n"
    x = torch.randint(-1000, 1000, (32, 4, 2), dtype=torch.int16)  # lane, matrix, pair
    out = execute(address + body, threads=32, tensor=x.clone())

    def matrices(lanes):  # lane l holds columns 2 (l % 4) and 2 (l % 4) + 1 of row l // 4
        return lanes.reshape(8, 4, 4, 2).permute(2, 0, 1, 3).reshape(4, 8, 8)

    expected = matrices(x).mT if transposed else matrices(x)
    assert torch.equal(matrices(out), expected)


def test_atomic_accesses():
    counts = in_every_order("red.global.gpu.relaxed.add.s32 [%d1], %r1;", ctas=3, elements=4)
    assert counts.tolist() == [3 * 63 * 32, 1, 2, 3]
    turn = "atom.global.add.u32 %r6, [%d1], 1;\n mul.wide.u32 %d4, %r6, 4;\n add.s64 %d5, %d1, %d4;\n"
    numbered = execute(turn + "st.global.b32 [%d5+4], 1;", ctas=2, tensor=torch.zeros(129, dtype=torch.int32))
    assert numbered.tolist() == [128] + 128 * [1]  # every thread has its own turn
    bounded = "atom.global.{op}.b32 %r6, [%d1], {operands};"
    assert execute(bounded.format(op="exch", operands="9"), elements=1).item() == 9
    assert execute(bounded.format(op="cas", operands="0, 5"), elements=1).item() == 5
    assert execute("atom.global.inc.u32 %r6, [%d1], 9;", elements=1).item() == 64 % 10
    shared = "st.shared.b32 [%r4], 0;\n bar.sync 0;\n atom.shared.max.s32 %r6, [%r4], %r1;\n bar.sync 0;\n"
    result = in_every_order(shared + "ld.shared.b32 %r7, [%r4];\n st.global.b32 [%d3], %r7;")
    assert result[:64].tolist() == [63] * 64
    caught("atom.global.add.u32 %r6, [%d1], 1;\n ld.global.b32 %r7, [%d1];", "race on x")
    loop = """
    ld.global.b32 %r6, [%d1];
$AGAIN:
    add.s32 %r7, %r6, 3;
    atom.global.cas.b32 %r8, [%d1], %r6, %r7;
    setp.ne.b32 %p1, %r8, %r6;
    mov.b32 %r6, %r8;
    @%p1 bra $AGAIN;
"""
    assert in_every_order(loop, ctas=2, elements=1).item() == 3 * 128


def test_counters():
    counters = Counters()
    load = "ld.global.b32 %r6, [%d3];\n setp.lt.u32 %p1, %r1, 8;\n @%p1 ld.global.v2.b32 {%r7, %r8}, [%d6];\n"
    address = "mul.wide.u32 %d5, %r1, 32;\n add.s64 %d6, %d1, %d5;\n"
    store = "setp.eq.b32 %p2, %r1, 3;\n @%p2 st.global.b32 [%d3+512], %r6;"
    storage = torch.zeros(256, dtype=torch.int32)
    execute(address + load + store, tensor=storage[:100], counters=counters)
    reads, writes = counters.traffic["global load"], counters.traffic["global store"]
    assert (reads.requests, reads.sectors, reads.useful) == (3, 4 + 4 + 8, 256 + 64)
    assert (writes.requests, writes.sectors, writes.useful) == (1, 1, 4)
    assert counters.by_op["ld"] == 2 * 3 and counters.by_op["ret"] == 2
    assert counters.instructions == 2 * (8 + 2 + 3 + 2 + 1)
    assert counters.unique_read == 256 and counters.unique_written == 4
    assert counters.padding_read == 0 and counters.padding_written == 4  # element 131 is in the storage alone


def test_a_race_explains_a_fault_that_follows_from_it():
    """Threads read an index that another warp may not have stored yet; here it is garbage."""
    body = exchange(32, "").replace("st.global", "mul.wide.u32 %d4, %r8, 4096;\n add.s64 %d3, %d1, %d4;\n st.global")
    with pytest.raises(Fault, match="race on shared memory") as info:
        execute(body)
    assert "out of bounds" in str(info.value.__cause__)
