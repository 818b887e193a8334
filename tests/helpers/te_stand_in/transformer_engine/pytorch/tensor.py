"""The type of quantized tensors, of which there are none."""


class QuantizedTensor:
    pass
