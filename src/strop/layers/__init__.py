"""The linear layers of a model, as modules: over codes, through rounding, with an adapter; and how they are exchanged.

base.py               what they have in common: shape [out, in], dense weight, bias
quant_linear.py       `QuantLinear`: over a frozen `QuantizedTensor`
int8_linear.py        `Int8Linear`, `OutlierInt8Linear`: int8 weights times int8 activations, summed as integers
quantized.py          all of these, and which a scheme asks for
fake_quant_linear.py  `FakeQuantLinear`: a trainable weight, rounded on every call
qat_lora_linear.py    `QatLoraLinear`: an adapter that is rounded together with its base
scale_linear.py       `ScaleLinear`: codes that stay, scales that learn
grids.py              what those train through: scales of ranges, learned ones, and codes that move within a limit
input_rounding.py     inputs rounded in training as the runtime rounds them
lora_linear.py        `LoraLinear`: any of them frozen, plus a trainable change of low rank
quant_experts.py      `QuantExperts`: the experts of a mixture over frozen codes, and how they are computed
surgery.py            find, choose, replace, undo
rotation.py           the same model with a rotated residual stream
"""
