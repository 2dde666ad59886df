"""The kernels that ``torch.compile`` makes of a model's forward and backward for a GPU, without one.

Dynamo and AOTAutograd trace the model on a CPU, with tensors that hold no data. Their graphs are then given to
Inductor as graphs of a GPU. What its scheduler joins into a kernel depends on sizes and dtypes alone. The code of the
kernels, for which it would need the GPU, is not generated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import codecache, scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import _disable_current_modes

from bench.ledger.operations import SPECIAL, Work
from patchkernels.ops import linear_buffers

GPU = torch.device("cuda", 0)
# An H100's, which Inductor asks for when it chooses between kinds of reductions.
PROPERTIES = DeviceProperties(
    type="cuda", index=0, multi_processor_count=132, cc=90, major=9, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
)  # fmt: skip


class Kernel(NamedTuple):
    """What runs as one kernel: a generated one, or an operation that Inductor leaves as it is."""

    name: str
    read: int  # bytes
    written: int  # bytes
    operation: fx.Node | None  # that is left as it is


@torch.library.custom_op("ledger::generated", mutates_args=())
def _generated(like: Tensor, name: str, read: int, written: int) -> Tensor:
    raise NotImplementedError("this operator has no data")


@_generated.register_fake
def _(like: Tensor, *_: Any) -> Tensor:
    return like.new_empty(1)


SPECIAL["ledger::generated"] = lambda args, kwargs, result: Work(args[2], args[3])


def compiled_graphs(model: Callable[..., Tensor], *shapes: tuple[int, ...]) -> list[fx.GraphModule]:
    """The graphs of the forward and of the backward of ``model``, for a GPU. Its inputs are int64, of these shapes.

    ``model`` gives a scalar, and its parameters are FakeTensors on the CPU.
    """
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table,
    )
    torch._dynamo.reset()
    with mock.patch.dict(linear_buffers.LOGITS_BYTES, cpu=linear_buffers.LOGITS_BYTES["cuda"]):
        inputs = (torch.zeros(shape, dtype=torch.int64) for shape in shapes)
        torch.compile(model, backend=backend, dynamic=False)(*inputs).backward()
    for graph in graphs:
        _move_to_gpu(graph)
    return graphs


def replay(graphs: list[fx.GraphModule]) -> None:
    """Runs the kernels of a forward and a backward, without data. To be called where FakeTensors can be on a GPU."""
    for place, graph in enumerate(graphs):
        like = torch.empty(1, device=GPU)
        for kernel in kernels_of(graph, is_backward=place > 0):
            if kernel.operation is None:
                torch.ops.ledger.generated(like, kernel.name, kernel.read, kernel.written)
            else:
                arguments, options = fx.node.map_arg(
                    (kernel.operation.args, kernel.operation.kwargs), lambda node: node.meta["val"]
                )
                kernel.operation.target(*arguments, **options)  # type: ignore[operator]


def _move_to_gpu(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        node.meta.pop("eager_input_vals", None)  # of the CPU
        of_gpu = {"device": GPU, "backend": "triton"}
        node.kwargs = {**node.kwargs, **{name: of_gpu[name] for name in of_gpu if name in node.kwargs}}
        node.args = tuple("triton" if argument == "eager" else argument for argument in node.args)
    graph.recompile()


def kernels_of(graph: fx.GraphModule, is_backward: bool) -> list[Kernel]:
    """What Inductor makes of the graph, in order."""
    placeholders = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    inputs = [on_gpu(value) for value in placeholders]
    mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    with _disable_current_modes(), _inductor_for_gpu(), V.set_fake_mode(mode):
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        view_to_reshape(graph)
        post_grad_passes(graph, False)
        lowering = GraphLowering(graph, inputs, is_backward=is_backward)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            lowering.init_wrapper_code()
            lowering._update_scheduler()
            return [_kernel(node) for node in lowering.scheduler.nodes if not _is_free(node)]


def on_gpu(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)


def _is_free(node: Any) -> bool:
    """Whether it starts no kernel: views of results, and concatenations whose parts were written in place."""
    name = type(node.node).__name__
    return isinstance(node, scheduler.NopKernelSchedulerNode) or name in ("MultiOutput", "ReinterpretView")


def _kernel(node: Any) -> Kernel:
    origins = {origin for part in node.get_nodes() for origin in part.node.origins}
    operation = None
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        operation = node.node.get_origin_node() or next(o for o in origins if o.target is node.node.op_overload)
    names = sorted({str(origin.target).split(".")[-2:][0] for origin in origins})
    return Kernel(" ".join(names), node.get_read_buffer_sizes(), node.get_write_buffer_sizes(), operation)


@contextlib.contextmanager
def _inductor_for_gpu() -> Iterator[None]:
    """Lets Inductor lower and schedule for a GPU that is not there."""
    system = {"hash": "", "device": {"name": "H100"}, "version": {}}
    with (
        mock.patch.object(DeviceProperties, "create", return_value=PROPERTIES),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=PROPERTIES),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(codecache.CacheBase, "get_system", staticmethod(lambda: system)),
        mock.patch.object(scheduler, "has_triton", return_value=True),
    ):
        yield
