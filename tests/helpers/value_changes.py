"""Changes of a pruned layer's values and patterns by every means; each yields errors against the present oracle."""

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from helpers.graph_replays import captured_in_evaluation, graphs, replayed
from helpers.numerics import relative_error
from helpers.present_values import BOUND, IN, OUT, Subject, build, random
from slope_megatron.sparsity.packing import pack, pack_bits
from slope_megatron.sparsity.pattern import column_pattern, magnitude_pattern

# What autograd says of a saved tensor.
REFUSED = "modified by an inplace operation"


def steps_of(optimizer_of):
    """The case of an optimizer: three steps, and evaluation before, between and after them."""

    def case(subject: Subject):
        optimizer = optimizer_of(subject.layer.parameters())
        for _ in range(3):
            yield from subject.train()
            yield from subject.evaluate()
            optimizer.step()
            yield from subject.evaluate()
            optimizer.zero_grad()
            yield from subject.evaluate()

    return case


def adamw(**options):
    # A step moves each value by about 0.5.
    return steps_of(lambda parameters: torch.optim.AdamW(parameters, lr=0.5, **options))


def evaluated_before_the_step(subject: Subject):
    """An evaluation between backward and the step, after which no gradient is left to tell of it."""
    optimizer = torch.optim.AdamW(subject.layer.parameters(), lr=0.5, fused=True)
    for _ in range(2):
        yield from subject.train()
        yield from subject.evaluate()
        optimizer.step()
        optimizer.zero_grad()
        yield from subject.evaluate()
        yield from subject.evaluate()


def gradients_in_main_grad(subject: Subject):
    """Megatron's DDP: autograd's gradient is moved to a buffer of its own, which stays."""
    weight = subject.layer.weight

    def move(parameter):
        parameter.main_grad, parameter.grad = parameter.grad, None

    hook = weight.register_post_accumulate_grad_hook(move)
    for _ in range(2):
        x = subject.x.clone().requires_grad_()
        subject.call(x).backward(subject.dy)
        for factor in (-2.0, 3.0):
            yield from subject.evaluate()
            weight.data.mul_(factor)
            yield from subject.evaluate()
    hook.remove()


def writes_through_data(subject: Subject):
    weight = subject.layer.weight
    yield from subject.train()
    weight.data.mul_(-2.0)
    yield from subject.train()
    weight.data.mul_(-2.0)
    yield from subject.evaluate()
    weight.data.mul_(-2.0)
    # In the midst of evaluating forwards it has to be said.
    subject.layer.refresh()
    yield from subject.evaluate()


def a_replaced_parameter(subject: Subject):
    layer = subject.layer
    yield from subject.evaluate()
    layer.weight = torch.nn.Parameter(-2.0 * layer.weight.detach())
    yield from subject.evaluate()
    layer.weight = torch.nn.Parameter(-2.0 * layer.weight.detach())
    yield from subject.train()
    # A new parameter on the old memory, whose versions are counted anew.
    layer.weight = torch.nn.Parameter(layer.weight.data)
    with torch.no_grad():
        layer.weight.mul_(3.0)
    yield from subject.evaluate()


def vectors_to_parameters(subject: Subject):
    """Also where a vector comes to lie where an earlier one lay."""
    parameters = list(subject.layer.parameters())
    for factor in (-2.0, 0.5, -3.0):
        vector_to_parameters(factor * parameters_to_vector(parameters), parameters)
        vector_to_parameters(factor * parameters_to_vector(parameters), parameters)
        yield from subject.evaluate()
        vector_to_parameters(factor * parameters_to_vector(parameters), parameters)
        yield from subject.train()


def functional_calls(subject: Subject):
    """The gradient flows to the tensor that was given, or through it."""
    own = subject.layer.weight
    for factor in (-2.0, 0.5, -3.0):
        yield from subject.evaluate(factor * own.detach())
        yield from subject.train((factor * own.detach()).requires_grad_())
    yield from subject.evaluate()
    base = own.detach().clone().requires_grad_()
    y = subject.call(subject.x, -2.0 * base)
    y.backward(subject.dy)
    expected = subject.oracle(-2.0 * base)
    yield relative_error(y, expected[0])
    yield relative_error(base.grad, -2.0 * expected[2])
    with torch.inference_mode():
        yield from subject.evaluate(-2.0 * own)
        yield from subject.evaluate(-3.0 * own)


def two_weights_before_their_backward(subject: Subject):
    """Each backward product has the weight of its own forward, in whatever order."""
    weights = [(factor * subject.layer.weight.detach()).requires_grad_() for factor in (-2.0, 0.5, -3.0)]
    inputs = [subject.x.clone().requires_grad_() for _ in weights]
    outputs = [subject.call(x, weight) for x, weight in zip(inputs, weights, strict=True)]
    for index in (0, 2, 1):
        outputs[index].backward(subject.dy)
        yield from subject.errors((outputs[index], inputs[index].grad, weights[index].grad), weights[index])
    yield from subject.evaluate()


def recomputed(subject: Subject):
    """A checkpointed forward runs twice; an optimizer without counted writes comes between the rounds."""
    optimizer = torch.optim.AdamW(subject.layer.parameters(), lr=0.5, fused=True)
    for reentrant in (True, False, True, False):
        yield from subject.train(call=lambda x, _, again=reentrant: checkpoint(subject.call, x, use_reentrant=again))
        optimizer.step()
    with torch.autograd.graph.save_on_cpu():
        yield from subject.train()


def another_type(subject: Subject):
    layer = subject.layer
    yield from subject.evaluate()
    before = layer.weight.dtype
    for dtype in (torch.bfloat16, before):
        layer.weight.data = layer.weight.data.to(dtype)
        subject.x = subject.x.to(dtype)
        found = subject.evaluate()
        # The oracle of bf16 numbers is exact, the product is not.
        yield from (error * BOUND[before] / BOUND[dtype] for error in found)


def new_patterns(subject: Subject):
    """Written in place, and put in the place of the old ones."""
    layer = subject.layer
    for seed in (5, 6):
        dense = random(OUT, IN, seed=seed, like=layer.weight)
        row = magnitude_pattern(dense, 2, 4)
        put(layer, "weight_pattern", pack_bits(row), in_place=seed == 5)
        # A second pruning of other rows' patterns is none: nothing is trained with it.
        yield from subject.evaluate()
        put(layer, "weight_column", pack_bits(pack(column_pattern(dense, row, 2, 4), row)), in_place=seed == 5)
        yield from subject.evaluate()
        yield from subject.train()
    layer.weight_pattern.copy_(pack_bits(magnitude_pattern(random(OUT, IN, seed=7, like=layer.weight), 2, 4)))
    layer.update_column_pattern()
    yield from subject.train()


def put(layer, name: str, bits: torch.Tensor, in_place: bool) -> None:
    if in_place:
        getattr(layer, name).copy_(bits)
    else:
        setattr(layer, name, bits)


def new_masks(subject: Subject):
    layer = subject.layer
    for seed in (5, 6):
        bits = pack_bits(magnitude_pattern(random(OUT, IN, seed=seed, like=layer.weight), 2, 4))
        put(layer, "weight_mask", bits, in_place=seed == 5)
        yield from subject.evaluate()
        yield from subject.train()


def write_between(name: str):
    """A write between forward and backward, which autograd refuses; 0.0 where it does."""

    def case(subject: Subject):
        yield from subject.train()
        y = subject.call(subject.x.clone().requires_grad_())
        with torch.no_grad():
            getattr(subject.layer, name).bitwise_not_() if name != "weight" else subject.layer.weight.mul_(2.0)
        try:
            y.backward(subject.dy)
        except RuntimeError as error:
            yield 0.0 if REFUSED in str(error) else 1.0
        else:
            yield 1.0

    return case


CASES = {
    "eager AdamW": adamw(foreach=False, fused=False),
    "foreach AdamW": adamw(foreach=True),
    "fused AdamW": adamw(fused=True),
    "evaluated before the step": evaluated_before_the_step,
    "main_grad": gradients_in_main_grad,
    "replayed": replayed,
    "captured in evaluation": captured_in_evaluation,
    "data": writes_through_data,
    "replaced": a_replaced_parameter,
    "vector_to_parameters": vectors_to_parameters,
    "functional_call": functional_calls,
    "two weights": two_weights_before_their_backward,
    "recomputed": recomputed,
    "weight between": write_between("weight"),
}
OF_KIND = {
    "packed": {
        "patterns": new_patterns,
        "another type": another_type,
        "row pattern between": write_between("weight_pattern"),
        "column pattern between": write_between("weight_column"),
    },
    "masked": {"masks": new_masks, "mask between": write_between("weight_mask")},
}
ON_GPU = {
    "capturable AdamW": adamw(capturable=True),
    "capturable fused AdamW": adamw(capturable=True, fused=True),
    "graphs": graphs,
}


def cases_of(kind: str, device: str = "cpu") -> dict:
    return {**CASES, **OF_KIND[kind], **(ON_GPU if device == "cuda" else {})}


def worst_of(kind: str, backend: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, float | str]:
    """The largest error of each case over its bound, on this rank; or what was raised."""
    found: dict[str, float | str] = {}
    for name, case in cases_of(kind, device).items():
        try:
            errors = list(case(Subject(build(kind, backend, dtype, device))))
            found[name] = max(errors) / BOUND[dtype]
        except Exception as error:
            found[name] = repr(error)
    return found
