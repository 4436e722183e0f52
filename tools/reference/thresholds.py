"""Where rounding decides: units of a network within rounding of a threshold, and what each does to gradients.

A ReLU's gradient is 1 above zero and 0 below, and a max pool's goes to the largest of a window. Two programs
that round otherwise can fall on two sides of such a threshold; then the loss is the same and gradients are
not, by the whole share of that unit. Which units can do that, and how much each can change, is found in
float64: one is meant whose distance from its threshold is within a few times what float32 was off there.
"""

import torch
from torch.nn import functional as F

# How far beyond float32's own largest error, over the units that share a call, rounding is believed to reach:
# both programs are off by it, in opposite directions, and another processor by more than this one.
REACH = 4.0


class Watch:
    """While it is entered, keeps what goes into each ReLU and max pool, and what comes out, in their order."""

    def __enter__(self):
        self.calls = []
        self.own = (F.relu, F.max_pool2d)
        F.relu, F.max_pool2d = self.relu, self.pool
        return self

    def __exit__(self, *error):
        F.relu, F.max_pool2d = self.own

    def keep(self, kind, x, out):
        if out.requires_grad:
            out.retain_grad()
            self.calls.append((kind, x, out))
        return out

    def relu(self, x, inplace=False):
        return self.keep("ReLU", x, torch.relu(x))

    def pool(self, x, kernel_size, stride, padding, *rest, **named):
        self.window = (kernel_size, stride, padding)
        return self.keep("max pool", x, self.own[1](x, kernel_size, stride, padding, *rest, **named))


def near(watch, rounded):
    """After the float64 loss's `backward(retain_graph=True)` under `watch`: each unit near its threshold, with what
    it is called, its distance, and the gradient that deciding otherwise adds to the call's input. `rounded` is the
    watch of the same pass in float32."""
    for number, ((kind, x, out), (_, x32, _)) in enumerate(zip(watch.calls, rounded.calls, strict=True)):
        within = REACH * (x.detach() - x32.detach()).abs().max().item()
        if out.grad is None:
            continue  # nothing that is compared comes from it
        of_kind = of_relu if kind == "ReLU" else of_pool
        for place, distance, change in of_kind(x.detach(), out.grad, within, watch):
            shape = "x".join(map(str, x.shape))
            yield f"{kind} {number} [{shape}] at {place}", distance, within, x, change


def of_relu(x, gradient, within, _watch):
    for place in (x.abs() <= within).nonzero():
        at = tuple(place.tolist())
        change = torch.zeros_like(x)
        # A unit that is on gives its gradient on; switched the other way, it takes it away or adds it.
        change[at] = gradient[at]
        yield at, x[at].item(), change


def of_pool(x, gradient, within, watch):
    edge, stride, padding = watch.window
    n, c, h, w = x.shape
    # Windows [n, c, edge * edge, outputs]; and where each of their values lies.
    cut = {"kernel_size": edge, "stride": stride}
    padded = F.pad(x, [padding] * 4, value=-torch.inf)
    windows = F.unfold(padded, **cut).unflatten(1, (c, edge * edge))
    (first, second), (i, j) = (t.unbind(2) for t in windows.topk(2, dim=2))
    places = torch.arange(h * w, dtype=x.dtype).reshape(1, 1, h, w)
    places = F.unfold(F.pad(places, [padding] * 4, value=-1), **cut)[0].long()  # [edge * edge, outputs]
    # Where the largest is a ReLU's zero there is no gradient to give to another.
    for sample, channel, window in ((first - second <= within) & (second > 0)).nonzero().tolist():
        at = (sample, channel, window)
        change = torch.zeros_like(x).flatten(2)
        value = gradient.flatten(2)[at]
        change[sample, channel, places[i[at], window]] = -value
        change[sample, channel, places[j[at], window]] = value
        yield at, (first[at] - second[at]).item(), change.reshape(x.shape)


def room(watch, rounded, named_parameters, most):
    """What all units near their thresholds together can add to the gradient of each parameter, elementwise and in
    absolute value; and a line for each unit: where it is, its distance, and the parameter that it can change most.
    More than `most` units are a fault of the comparison."""
    names, parameters = zip(*named_parameters)
    total = [torch.zeros_like(p) for p in parameters]
    lines = []
    for name, distance, within, x, change in near(watch, rounded):
        assert len(lines) < most, f"more than {most} units near their thresholds"
        effect = torch.autograd.grad(x, parameters, change, retain_graph=True, allow_unused=True)
        shares = {}
        for i, e in enumerate(effect):
            if e is not None:
                total[i] += e.abs()
                shares[names[i]] = (e.abs().max() / parameters[i].grad.abs().max()).item()
        worst = max(shares, key=shares.get)
        lines.append(f"{name}: {distance:.1e} from its threshold, float32 within {within:.1e}: {shares[worst]:.1e} of {worst}")
    return dict(zip(names, total)), lines
