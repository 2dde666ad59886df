"""A GPU that is not there: everything that the host does to feed it, with tensors that have no data.

    with FakeCuda() as gpu:
        loss = patch_cross_entropy(torch.randn(4, 99, device="cuda", requires_grad=True), target)
        gpu.backward(loss)
    gpu.launches  # the Triton kernels in the order of their launch

Tensors are those of torch's ``FakeTensorMode``, and the bodies of our custom operators run on them as on a GPU: chunks,
products and launchers are real; kernels are recorded instead of executed. Whatever would make the host wait for the GPU
raises :class:`HostWaits`, and a number that a GPU would round to 16 bits unasked raises :class:`Narrowed`. The current
device is kept as ``torch.cuda`` keeps it, by ``torch.cuda``'s own guards. An :class:`Observer` is told of everything
that the GPU would do.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from patchkernels.kernels import cross_entropy, patch_embedding, scaling, targets
from patchkernels.ops.registration import BODIES

KERNEL_MODULES = (cross_entropy, patch_embedding, scaling, targets)

# Operators that take a number as a tensor of the CPU, and read it there.
TAKE_CPU_NUMBERS = ("aten::fill_",)
# Operators that take a number as a tensor and read it, wherever it is.
READ_NUMBERS = ("aten::masked_fill", "aten::masked_fill_", "aten::index_fill", "aten::index_fill_")
PRODUCTS = ("aten::mul", "aten::mul_", "aten::div", "aten::div_")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


@torch.library.custom_op("fake_cuda::silu_backward", mutates_args=())
def _silu_backward(upstream: Tensor, x: Tensor) -> Tensor:
    raise NotImplementedError("this operator has no data")


@_silu_backward.register_fake
def _(upstream: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


# Backwards that are one kernel on a GPU, but several operations for tensors without data.
ONE_KERNEL = {"SiluBackward0": lambda node, upstream: torch.ops.fake_cuda.silu_backward(upstream, node._saved_self)}


class HostWaits(Exception):
    """An operation for which the host would wait until the GPU has done all that was asked of it before."""


class Narrowed(Exception):
    """A product of a 16-bit tensor and a wider number on the GPU, which rounds the number to 16 bits, unlike a CPU."""


class Launch(NamedTuple):
    """A kernel, the GPU that was current when it was launched, and the GPUs of its tensors."""

    kernel: str
    current: int
    tensors: set[int]


class Observer(Protocol):
    """Is told of what runs on the GPU, in order."""

    def operation(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """An operation of PyTorch, after it has run."""

    def launch(self, kernel: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """A Triton kernel and the arguments of its launch, by name."""


class FakeCuda(contextlib.AbstractContextManager["FakeCuda"]):
    """Makes ``device="cuda"`` work without a GPU, and without data."""

    def __init__(self, observer: Observer | None = None) -> None:
        self.observer = observer
        self.launches: list[Launch] = []
        self.sums: list[tuple[torch.dtype, ...]] = []  # of every product with an out_dtype: its result and factors
        self.current = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> FakeCuda:
        enter = self._stack.enter_context
        enter(_graphs_on_cuda())
        for name in ("_exchange_device", "_maybe_exchange_device"):
            enter(mock.patch.object(torch.cuda, name, partial(self._exchange_device)))  # Dynamo wants two functions
        enter(mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False))
        enter(mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True))  # autocast asks
        foreach = "_has_foreach_support"  # clipping asks it for plain tensors
        enter(mock.patch.object(torch.nn.utils.clip_grad, foreach, return_value=True))
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            enter(mock.patch.object(owner, "synchronize", _wait))
        for module in KERNEL_MODULES:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                enter(mock.patch.object(module, name, _Kernel(name, getattr(module, name).arg_names, self)))
        enter(mock.patch.object(torch.autograd.function.FunctionCtx, "set_materialize_grads", _set_materialize_grads))
        keep_graph = "_get_current_graph_task_keep_graph"  # nodes go when they have been called
        enter(mock.patch.object(torch._C._autograd, keep_graph, return_value=False))
        enter(FakeTensorMode())
        enter(_Host(self))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def _exchange_device(self, index: int) -> int:
        previous, self.current = self.current, index if index >= 0 else self.current
        return previous

    def backward(self, out: Tensor, upstream: Tensor | None = None) -> None:
        """``out.backward(upstream)``, node by node: torch's engine refuses a device that it was not built for.

        Nodes go when they have been called, and with them what they have saved. ``out`` is therefore detached.
        """
        order = _topological(out.grad_fn)
        grads: dict[Any, dict[int, Tensor]] = {order[-1]: {0: torch.ones_like(out) if upstream is None else upstream}}
        out.detach_()
        del upstream
        with torch.no_grad():
            while order:
                node = order.pop()
                results = _call(node, grads.pop(node, {}))
                for (successor, slot), grad in results:
                    if type(successor).__name__ == "AccumulateGrad":
                        leaf = successor.variable
                        leaf.grad = grad if leaf.grad is None else leaf.grad + grad
                    else:
                        found = grads.setdefault(successor, {})
                        found[slot] = found[slot] + grad if slot in found else grad


class _Kernel:
    """Stands for a Triton kernel: records its launches."""

    def __init__(self, name: str, arguments: list[str], gpu: FakeCuda) -> None:
        self.name, self.arguments, self.gpu = name, arguments, gpu

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            tensors = {t.get_device() for t in args if isinstance(t, Tensor)}
            self.gpu.launches.append(Launch(self.name, self.gpu.current, tensors))
            if self.gpu.observer is not None:
                self.gpu.observer.launch(self.name, grid, dict(zip(self.arguments, args)) | kwargs)

        return launch


class _Host(TorchDispatchMode):
    """Raises HostWaits for every operation that waits, and runs the bodies of our operators instead of their fakes."""

    def __init__(self, gpu: FakeCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split(".")[0]
        if func.namespace == "patchkernels":
            with self:
                return BODIES[func._name](*args, **kwargs)
        if func.namespace == "c10d":  # collectives wait on the GPU, not on the host
            return args[0], FakeWork().boxed()
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        reason = _why_it_waits(func, name, args, kwargs, {t.device.type for t in inputs})
        if reason:
            raise HostWaits(f"{func}: {reason}")
        if name in PRODUCTS and _narrows([t for t in inputs if t.is_cuda and t.is_floating_point()]):
            raise Narrowed(f"{func}: {[(t.dtype, tuple(t.shape)) for t in inputs]}")
        if func in (torch.ops.aten.addmm.dtype_out, torch.ops.aten.mm.dtype_out):  # fake tensors have them not yet
            product, factors = kwargs["out"].dtype, [tensor.dtype for tensor in inputs[-3:-1]]
            if product not in (factors[0], torch.float32):
                raise RuntimeError(f"out_dtype must be the same as input dtype or fp32, got {product} for {factors}")
            self.gpu.sums.append((product, *factors))
            result = kwargs["out"]
        else:
            result = func(*args, **kwargs)
        if self.gpu.observer is not None:
            self.gpu.observer.operation(func, args, kwargs, result)
        return result


def _why_it_waits(func: Any, name: str, args: Any, kwargs: Any, devices: set[str]) -> str | None:
    if name == "aten::_to_copy" and kwargs.get("device") is not None:
        devices = devices | {torch.device(kwargs["device"]).type}
    if "cuda" not in devices:
        return None
    if len(devices) > 1 and name not in TAKE_CPU_NUMBERS:
        return "a copy between the CPU and the GPU"
    if torch.Tag.data_dependent_output in func.tags:
        return "the host reads the result"
    if name in READ_NUMBERS and any(isinstance(argument, Tensor) and argument.is_cuda for argument in args[-1:]):
        return "the host reads the number"
    if name in INDEXING:  # tagged too, but only masks make it wait
        masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
        return "the host counts the elements of a mask" if masks else None
    if torch.Tag.dynamic_output_shape in func.tags:
        return "the size of the result depends on the data"
    return None


def _narrows(factors: list[Tensor]) -> bool:
    widths = [{t.element_size() for t in factors if (t.ndim == 0) == number} for number in (True, False)]
    return all(widths) and max(widths[0]) > max(widths[1])


def _wait(*_: Any, **__: Any) -> None:
    raise HostWaits("synchronize() waits for the GPU")


@contextlib.contextmanager
def _graphs_on_cuda() -> Iterator[None]:
    """Lets autograd record operations on tensors of a GPU in a build of torch without CUDA.

    It asks for the device's guard, and there is none. That of the meta device, which does nothing, takes its place.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    guards = (ctypes.c_void_p * 24).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10::DeviceType
    previous, guards[cuda] = guards[cuda], guards[meta]
    try:
        yield
    finally:
        guards[cuda] = previous


def _set_materialize_grads(ctx: Any, value: bool) -> None:
    """``ctx.set_materialize_grads``, which also keeps the value where it can be read."""
    ctx.materialize_grads = ctx.materializes = value


def _topological(root: Any) -> list[Any]:
    """The nodes of a graph, each after those that it passes gradients to; without the leaves."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, successors_done = stack.pop()
        if successors_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            successors = [successor for successor, _ in node.next_functions if successor is not None]
            stack += [(s, False) for s in successors if type(s).__name__ != "AccumulateGrad"]
    return order


def _call(node: Any, grads: dict[int, Tensor]) -> list[tuple[tuple[Any, int], Tensor]]:
    """The edges of a node and the gradients that it passes along them."""
    inputs = [grads.get(slot) for slot in range(len(node._input_metadata))]
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        if getattr(node, "materializes", True):
            inputs = [
                torch.zeros(m.shape, dtype=m.dtype, device=m.device) if grad is None else grad
                for grad, m in zip(inputs, node._input_metadata)
            ]
        outputs = node.apply(*inputs)
    elif type(node).__name__ in ONE_KERNEL:
        outputs = ONE_KERNEL[type(node).__name__](node, *inputs)
    else:
        outputs = node(*inputs)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    assert len(outputs) in (0, len(edges)), (node, outputs, edges)
    return [(edge, _as_recorded(grad, *edge)) for edge, grad in zip(edges, outputs)]


def _as_recorded(grad: Tensor, successor: Any, slot: int) -> Tensor:
    """The gradient in the shape and dtype of the forward's tensor, which may have been expanded there."""
    metadata = successor._input_metadata[slot]
    return grad.sum_to_size(metadata.shape).to(metadata.dtype)
