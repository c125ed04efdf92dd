"""ONNX Runtime's dynamic int8 linear: DynamicQuantizeLinear, MatMulInteger, scale and bias, which it fuses itself.

One scale for the whole activation, fp32 in and out; the casts of a bf16 user are timed. Threads are torch's number.
Needs the packages onnxruntime and onnx (to write the small model).
"""

from collections.abc import Callable

import onnx
import onnxruntime
import torch
from burnish.bench import Peer
from burnish.ops import int8_linear_unpack
from burnish.registry import Case
from onnx import TensorProto, helper, numpy_helper


def supports(op: str, case: Case) -> str | None:
    if op != "int8_linear":
        return "only int8_linear has an ONNX form"
    if case.options.get("activation", "none") != "none":
        return "the small model has no activation"
    return None


def make(op: str, args: tuple) -> Callable[[], torch.Tensor]:
    x, weight, scale, bias, _, out_dtype = args
    channels, width = scale.shape[0], x.shape[-1]
    canonical = int8_linear_unpack(weight, channels, width)
    offset = torch.zeros(channels) if bias is None else bias.float()
    weights = {"w": canonical.T.contiguous(), "ws": scale, "wz": torch.zeros(channels, dtype=torch.int8), "b": offset}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "xs", "xz"]),
        helper.make_node("MatMulInteger", ["q", "w", "xz", "wz"], ["acc"]),
        helper.make_node("Cast", ["acc"], ["accf"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "ws"], ["s"]),
        helper.make_node("Mul", ["accf", "s"], ["z"]),
        helper.make_node("Add", ["z", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*x.shape[:-1], channels])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning would slow everyone else
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    out = out_dtype or x.dtype
    return lambda: torch.from_numpy(session.run(None, {"x": x.float().numpy()})[0]).to(out)


PEER = Peer("onnxruntime-int8", f"{onnxruntime.__version__}, onnx {onnx.__version__}", supports, make)
