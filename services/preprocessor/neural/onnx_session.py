"""ONNX models: sessions that run them, and small graphs written down by hand. Knows no annotator."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.preprocessor.device import Device

# What ONNX Runtime 1.18 and later read.
IR_VERSION, OPSET = 9, 17
# Warnings about nothing that an operator could change.
ERRORS_ONLY = 3


def open_session(model: bytes | Path, device: Device) -> Any:
    """On the CPU, with as many threads as the device says."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = device.threads
    options.log_severity_level = ERRORS_ONLY
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class Graph:
    """Operators are added in the order in which they run; names of values are made up."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._outputs: list[str] = []

    def constant(self, name: str, values: Any) -> str:
        from onnx import numpy_helper

        self._constants.append(numpy_helper.from_array(values, name))
        return name

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"value{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def convolution(self, value: str, state: Mapping[str, Any], name: str, *, padding: int) -> str:
        """A convolution whose weight and bias torch knows by the name."""
        parameters = [self.constant(f"{name}.{part}", state[f"{name}.{part}"]) for part in ("weight", "bias")]
        return self.add("Conv", value, *parameters, pads=[padding] * 4)

    def output(self, value: str) -> None:
        self._outputs.append(value)

    def model(self, *, inputs: Mapping[str, Sequence[int | str]]) -> bytes:
        """The whole as ONNX Runtime reads it; every value is of float32."""
        from onnx import TensorProto, helper

        graph = helper.make_graph(
            self._nodes,
            "fanlight",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self._outputs],
            self._constants,
        )
        model = helper.make_model(graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)])
        data: bytes = model.SerializeToString()
        return data
