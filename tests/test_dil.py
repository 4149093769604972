"""DIL: closed forms on quadratics, properties on networks, degeneracies, state preservation, confounder sets, bad input."""
import copy
import math
import warnings
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from irnb import degradations as deg
from irnb.networks import build
from irnb.strategies import dil
from irnb.strategies.dil import (DIL, PRESETS, RELEASED, VARIANTS, ConfounderBatch, ConfounderSet, dataset_types, dil_direction,
                                 gaussian_blur, gaussian_noise, hybrid, pick_confounders, rain_families, real_esrgan, released_order, task_confounders)
from irnb.strategies.strategy import Supervised, ToyNet, charbonnier, contract, l1, mse, toy_batch

f64 = torch.float64


# --- quadratics -------------------------------------------------------------------------------------------------------------------
class Point(nn.Module):
    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(theta.clone())

    def forward(self, x):
        return self.theta.expand(len(x), -1)


def quadratic(theta, target):
    A, b = target[..., :-1], target[..., -1]
    return (0.5 * torch.einsum("bi,bij,bj->b", theta, A, theta) - (b * theta).sum(1)).mean()


def batch_of(A, b, weights=None):
    y = [torch.cat([Ai, bi[:, None]], 1)[None] for Ai, bi in zip(A, b)]
    return ConfounderBatch([torch.zeros(1, 1, dtype=f64) for _ in y], y, [f"c{i}" for i in range(len(y))], weights)


def random_quadratics(n=3, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    M = torch.randn(n, d, d, generator=g, dtype=f64)
    return M @ M.mT / d + 0.1 * torch.eye(d, dtype=f64), torch.randn(n, d, generator=g, dtype=f64)


class Case:
    "Random support and query quadratics, a point, and the formulas of the directions."
    def __init__(self, n=3, d=4, seed=0, alpha=0.07, same=False):
        self.A, self.b = random_quadratics(n, d, seed)
        self.Aq, self.bq = (self.A, self.b) if same else random_quadratics(n, d, seed + 50)
        self.theta = torch.randn(d, generator=torch.Generator().manual_seed(seed + 99), dtype=f64)
        self.n, self.d, self.a, self.same = n, d, alpha, same
        self.Am, self.bm, self.Aqm, self.bqm = self.A.mean(0), self.b.mean(0), self.Aq.mean(0), self.bq.mean(0)
        self.I = torch.eye(d, dtype=f64)

    def chain(self, order):
        M, c = self.I, torch.zeros(self.d, dtype=f64)
        for k in order:
            step = self.I - self.a * self.A[k]
            M, c = step @ M, step @ c + self.a * self.b[k]
        return M, c

    def formula(self, variant, order):
        I, a, t, A, b, Am, bm, Aqm, bqm = self.I, self.a, self.theta, self.A, self.b, self.Am, self.bm, self.Aqm, self.bqm
        M, c = self.chain(order)
        grads = [A[i] @ t - b[i] for i in range(self.n)]
        loo = lambda S, i: (S.sum(0) - S[i]) / (self.n - 1)
        mean_phi = t - a * (Am @ t - bm)
        return {
            "erm": lambda: Am @ t - bm,
            "ps": lambda: (I - a * Am) @ (Aqm @ mean_phi - bqm),
            "ss": lambda: sum((I - a * A[i]) @ (Aqm @ (t - a * grads[i]) - bqm) for i in range(self.n)) / self.n,
            "ss_same": lambda: sum((I - a * A[i]) @ (self.Aq[i] @ (t - a * grads[i]) - self.bq[i]) for i in range(self.n)) / self.n,
            "ss_loo": lambda: sum((I - a * A[i]) @ (loo(self.Aq, i) @ (t - a * grads[i]) - loo(self.bq, i)) for i in range(self.n)) / self.n,
            "ss_chain": lambda: M.T @ (Aqm @ (M @ t + c) - bqm),
            "sf": lambda: (t - M @ t - c) / (self.n * a),
            "pf": lambda: 0.5 * ((Am @ t - bm) + Aqm @ mean_phi - bqm),
            "ps_fo": lambda: Aqm @ mean_phi - bqm,
            "ss_fo": lambda: Aqm @ mean_phi - bqm,
            "pf_branch": lambda: sum(grads[i] + A[i] @ (t - a * grads[i]) - b[i] for i in range(self.n)) / (2 * self.n),
        }[variant]()

    def direction(self, variant, theta=None, **kw):
        query = None if self.same else batch_of(self.Aq, self.bq)
        kw = {"alpha": self.a} | kw
        if variant == "pf_branch":
            kw = {"inner_steps": 2} | kw
        return dil_direction(Point(self.theta if theta is None else theta), quadratic, batch_of(self.A, self.b), query, variant=variant, **kw)


@pytest.mark.parametrize("mixed", ["concat", "separate"])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("variant", ["erm", "ps", "ss", "ss_same", "ss_loo", "ss_chain", "sf", "pf", "ps_fo", "ss_fo", "pf_branch"])
def test_quadratic_closed_forms(variant, same, mixed):
    for seed, order in enumerate([(0, 1, 2), (2, 0, 1), (1, 2, 0)]):
        case = Case(seed=seed, same=same)
        torch.testing.assert_close(case.direction(variant, order=order, mixed=mixed).grads["theta"], case.formula(variant, order), rtol=0, atol=1e-12)


@pytest.mark.parametrize("hvp", ["explicit", "autograd", "jvp", "finite_difference"])
@pytest.mark.parametrize("variant", ["ps", "ss", "ss_chain"])
def test_hvp_modes_on_quadratics(variant, hvp):
    case, order = Case(seed=4), (2, 1, 0)
    torch.testing.assert_close(case.direction(variant, order=order, hvp=hvp).grads["theta"], case.formula(variant, order), rtol=0,
                               atol=1e-8 if hvp == "finite_difference" else 1e-12)


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_pf_steps_on_the_same_mix(steps):
    c = Case(seed=2, same=True)
    power = torch.linalg.matrix_power(c.I - c.a * c.Am, steps)
    want = (c.I - power) @ (c.theta - torch.linalg.solve(c.Am, c.bm)) / (steps * c.a)
    torch.testing.assert_close(c.direction("pf", inner_steps=steps).grads["theta"], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [2, 3])
def test_ps_with_several_inner_steps(steps):
    c = Case(seed=3)
    phi = c.theta
    for _ in range(steps):
        phi = phi - c.a * (c.Am @ phi - c.bm)
    want = torch.linalg.matrix_power(c.I - c.a * c.Am, steps) @ (c.Aqm @ phi - c.bqm)
    for hvp in ("explicit", "autograd"):
        torch.testing.assert_close(c.direction("ps", inner_steps=steps, hvp=hvp).grads["theta"], want, rtol=0, atol=1e-12)


def test_the_scalar_example():
    a, c = torch.tensor([1., 3.], dtype=f64), torch.tensor([0., 2.], dtype=f64)
    batch = batch_of(a.view(2, 1, 1), (a * c).view(2, 1))
    G = lambda variant, **kw: dil_direction(Point(torch.ones(1, dtype=f64)), quadratic, batch, variant=variant, alpha=0.1, **kw).grads["theta"].item()
    want = {"erm": -1.0, "ps": -.64, "ss": -.68, "pf": -.9, "ss_same": -.33, "ss_loo": -1.03}
    for variant, value in want.items():
        assert G(variant) == pytest.approx(value, abs=1e-10), variant
    assert G("sf", order=[0, 1]) == pytest.approx(-1.15, abs=1e-10)
    assert G("sf", order=[1, 0]) == pytest.approx(-.85, abs=1e-10)
    assert G("ss_chain", order=[0, 1]) == pytest.approx(-.3402, abs=1e-10)


def test_stationary_points():
    c = Case(n=3, seed=5, alpha=0.05, same=True)
    erm = torch.linalg.solve(c.Am, c.bm)
    for variant in ("erm", "ps", "pf"):
        assert c.direction(variant, theta=erm).grads["theta"].norm() < 1e-10
    M, b = c.chain((0, 1, 2))
    chain = torch.linalg.solve(c.I - M, b)
    assert c.direction("sf", theta=chain, order=(0, 1, 2)).grads["theta"].norm() < 1e-10
    B = [c.I - c.a * A for A in c.A]
    left = sum(Bi @ c.Am @ Bi for Bi in B) / c.n
    right = sum(Bi @ (c.bm - c.a * c.Am @ bi) for Bi, bi in zip(B, c.b)) / c.n
    branch = torch.linalg.solve(left, right)
    assert c.direction("ss", theta=branch).grads["theta"].norm() < 1e-10
    assert 1e-4 < (chain - erm).norm() < 1 and 1e-5 < (branch - erm).norm() < 1   # moved, by O(alpha)


def test_linear_regression_with_nn_mseloss():
    g = torch.Generator().manual_seed(1)
    X, t = torch.randn(2, 7, 3, generator=g, dtype=f64), torch.randn(2, 7, 1, generator=g, dtype=f64)
    net = nn.Linear(3, 1, bias=False, dtype=f64)
    A, b = 2 * X.mT @ X / 7, 2 * (X.mT @ t)[..., 0] / 7
    batch = ConfounderBatch(list(X), list(t), ["a", "b"])
    case = Case(n=2, d=3, same=True, alpha=0.03)
    case.A = case.Aq = A
    case.b = case.bq = b
    case.Am = case.Aqm = A.mean(0)
    case.bm = case.bqm = b.mean(0)
    case.theta = net.weight.detach()[0]
    for variant in ("erm", "sf", "pf", "ps", "ss"):
        found = dil_direction(net, nn.MSELoss(), batch, variant=variant, alpha=0.03, order=(1, 0)).grads["weight"][0]
        torch.testing.assert_close(found, case.formula(variant, (1, 0)), rtol=0, atol=1e-11)


def test_weights_are_probabilities():
    c, w = Case(n=3, seed=8, same=True), (0.5, 0.3, 0.2)
    weighted = batch_of(c.A, c.b, w)
    G = lambda variant, alpha: dil_direction(Point(c.theta), quadratic, weighted, variant=variant, alpha=alpha, order=(0, 1, 2), inner_steps=2 if "pf" in variant else None).grads["theta"]
    want = sum(wi * (A @ c.theta - b) for wi, A, b in zip(w, c.A, c.b))
    torch.testing.assert_close(G("erm", .1), want, rtol=0, atol=1e-12)
    for variant in ("sf", "pf", "ps", "ss", "ss_chain", "pf_branch"):
        torch.testing.assert_close(G(variant, 1e-7), want, rtol=0, atol=1e-5)
    one = dil_direction(Point(c.theta), quadratic, weighted, variant="ss", alpha=.1).grads["theta"]
    Aw, bw = sum(wi * A for wi, A in zip(w, c.A)), sum(wi * b for wi, b in zip(w, c.b))
    hand = sum(wi * (c.I - .1 * A) @ (Aw @ (c.theta - .1 * (A @ c.theta - b)) - bw) for wi, A, b in zip(w, c.A, c.b))
    torch.testing.assert_close(one, hand, rtol=0, atol=1e-12)


# --- networks ---------------------------------------------------------------------------------------------------------------------
class Smooth(nn.Module):
    "Two convolutions with tanh, in double precision."
    def __init__(self, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(3, 1, 3, 3, generator=g, dtype=f64))
        self.v = nn.Parameter(torch.randn(1, 3, 3, 3, generator=g, dtype=f64))

    def forward(self, x):
        return F.conv2d(torch.tanh(F.conv2d(x, self.w, padding=1)), self.v, padding=1)


def images(n=3, batch=2, side=6, seed=0, channels=1, dtype=f64):
    g = torch.Generator().manual_seed(seed)
    make = lambda: [torch.rand(batch, channels, side, side, generator=g, dtype=dtype) for _ in range(n)]
    return ConfounderBatch(make(), make(), [f"c{i}" for i in range(n)])


def flat(direction):
    return torch.cat([g.reshape(-1) for g in direction.grads.values()])


def find(variant, alpha=0.05, net=None, support=None, query=None, loss=mse, **kw):
    return dil_direction(net or Smooth(), loss, support or images(), query, variant=variant, alpha=alpha, **kw)


def objective(variant, support, query, alpha, loss=mse):
    "The second-order objectives written out, as functions of a flat parameter vector."
    net = Smooth()
    shapes = [p.shape for p in net.parameters()]

    def run(vector, x, y):
        w, v = (part.view(s) for part, s in zip(vector.split([s.numel() for s in shapes]), shapes))
        return loss(F.conv2d(torch.tanh(F.conv2d(x, w, padding=1)), v, padding=1), y)

    def grad(vector, terms):
        leaf = vector.detach().requires_grad_()
        return torch.autograd.grad(sum(run(leaf, x, y) for x, y in terms) / len(terms), leaf)[0]

    def value(vector):
        s, q = list(zip(support.x, support.y)), list(zip(query.x, query.y))
        mean = lambda phi, terms: sum(run(phi, x, y) for x, y in terms) / len(terms)
        if variant == "ps":
            return mean(vector - alpha * grad(vector, s), q)
        if variant == "ss_chain":
            phi = vector
            for x, y in s:
                phi = phi - alpha * grad(phi, [(x, y)])
            return mean(phi, q)
        outer = {"ss": lambda i: q, "ss_same": lambda i: [q[i]], "ss_loo": lambda i: q[:i] + q[i + 1:]}[variant]
        return sum(mean(vector - alpha * grad(vector, [s[i]]), outer(i)) for i in range(len(s))) / len(s)
    return value, torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("variant", ["ps", "ss", "ss_same", "ss_loo", "ss_chain"])
def test_second_order_against_finite_differences(variant):
    support, query = images(seed=1), images(seed=2)
    value, at = objective(variant, support, query, 0.05)
    found = flat(find(variant, support=support, query=query, order=(0, 1, 2)))
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        v = torch.randn(len(at), generator=g, dtype=f64)
        v /= v.norm()
        f = lambda h: float(value(at + h * v))
        slope = (8 * (f(1e-3) - f(-1e-3)) - (f(2e-3) - f(-2e-3))) / 12e-3          # fourth order
        assert float(found @ v) == pytest.approx(slope, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("variant", ["ps", "ss", "ss_chain", "ss_same"])
def test_hvp_modes_agree(variant):
    kw = dict(support=images(seed=1), query=images(seed=2), order=(2, 0, 1))
    want = flat(find(variant, hvp="explicit", **kw))
    for hvp, error in (("autograd", 1e-12), ("jvp", 1e-12), ("finite_difference", 1e-6)):
        torch.testing.assert_close(flat(find(variant, hvp=hvp, **kw)), want, rtol=0, atol=error * float(want.norm()))


NORMALISED = {"NAFNet": lambda: build("NAFNet", preset="tiny"), "Restormer": lambda: build("Restormer", preset="tiny"),
              "BatchNorm": lambda: with_norm(nn.BatchNorm2d(6)), "BatchNorm without statistics": lambda: with_norm(nn.BatchNorm2d(6, track_running_stats=False)),
              "InstanceNorm": lambda: with_norm(nn.InstanceNorm2d(6, affine=True)), "GroupNorm": lambda: with_norm(nn.GroupNorm(2, 6))}


def with_norm(norm):
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norm, nn.GELU(), nn.Conv2d(6, 3, 3, padding=1))


def moved(name):
    "A network in double precision whose weights are off their initial values (some blocks begin with a factor of zero)."
    torch.manual_seed(0)
    net = NORMALISED[name]().double()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net


@pytest.mark.parametrize("loss", [mse, charbonnier, nn.MSELoss()], ids=["mse", "charbonnier", "MSELoss"])
@pytest.mark.parametrize("name", list(NORMALISED))
def test_hessian_modes_agree_through_normalisation(name, loss):
    "On convolutions alone every order of differentiation is right; through LayerNorm and BatchNorm not."
    net = moved(name)
    kw = dict(net=net, loss=loss, support=images(n=2, channels=3, side=8, seed=1), query=images(n=2, channels=3, side=8, seed=2), order=(1, 0))
    want = flat(find("ss", hvp="explicit", **kw))
    curvature = float((want - flat(find("ss_fo", **kw))).norm())
    assert curvature > 1e-3 * float(want.norm())   # there is a Hessian to be wrong about
    ways = {"jvp": {"hvp": "jvp"}} | ({} if list(net.buffers()) else {"vmap": {"branches": "vmap"}})
    assert len(ways) == 2 or name == "BatchNorm"
    for way in ways.values():
        torch.testing.assert_close(flat(find("ss", **way, **kw)), want, rtol=0, atol=1e-9 * float(want.norm()))


def test_jvp_leaves_other_squared_errors_to_torch():
    "Only the plain mean is written out; sums go to torch, which stops or is right, but never silently wrong."
    kw = dict(net=moved("InstanceNorm"), support=images(n=2, channels=3, side=8, seed=1), query=images(n=2, channels=3, side=8, seed=2), order=(1, 0))
    for loss in (lambda a, b: F.mse_loss(a, b, reduction="sum") / a.numel(), lambda a, b: F.mse_loss(a, b, reduction="none").mean()):
        want = flat(find("ss", loss=loss, hvp="explicit", **kw))
        try:
            found = flat(find("ss", loss=loss, hvp="jvp", **kw))
        except RuntimeError:
            continue
        torch.testing.assert_close(found, want, rtol=0, atol=1e-9 * float(want.norm()))


class Masked(nn.Module):
    "One weight and a dropout mask on its input."
    def __init__(self):
        super().__init__()
        self.weight, self.drop = nn.Parameter(torch.ones((), dtype=f64)), nn.Dropout(0.5)

    def forward(self, x):
        return self.weight * self.drop(x)


def test_vmap_sees_the_same_dropout_mask_in_the_hessian_product():
    """L = a theta^2 with a drawn by the mask, so a and b follow from the two losses, and G = 2 b phi (1 - 2 alpha a) only if
    the Hessian product drew the a of the inner step."""
    x = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=f64)
    batch, alpha = ConfounderBatch([x], [torch.zeros_like(x)], ["one"]), 0.2
    def run(seed, outside):
        torch.manual_seed(outside)
        return find("ss", alpha, net=Masked(), support=batch, branches="vmap", generator=torch.Generator().manual_seed(seed))
    d = run(3, 1)
    a = float(d.support_loss)
    phi = 1 - 2 * alpha * a
    b = float(d.query_loss) / phi ** 2
    assert a != pytest.approx(b)   # the outer loss has masks of its own
    assert float(d.grads["weight"]) == pytest.approx(2 * b * phi * (1 - 2 * alpha * a), rel=1e-12)
    assert torch.equal(run(3, 2).grads["weight"], d.grads["weight"])   # the global random state does not matter
    assert not torch.equal(run(4, 1).grads["weight"], d.grads["weight"])


@pytest.mark.parametrize("variant", ["sf", "pf", "ps", "ss", "ss_same", "ss_chain", "pf_branch"])
def test_small_alpha_is_erm(variant):
    support, query = images(seed=1), images(seed=2)
    s, q = flat(find("erm", support=support)), flat(find("erm", support=query))
    limit = {"sf": s, "pf_branch": s, "pf": (s + q) / 2}.get(variant, q)
    kw = {"inner_steps": 2} if variant.startswith("pf") else {}
    errors = [float((flat(find(variant, alpha, support=support, query=query, order=(0, 1, 2), **kw)) - limit).norm()) for alpha in (1e-3, 5e-4)]
    assert errors[0] < 0.3 * float(limit.norm()) and errors[0] / errors[1] == pytest.approx(2, abs=0.1)


def test_ss_and_ps_differ_by_alpha_squared():
    gaps = [float((flat(find("ss", a)) - flat(find("ps", a, mixed="separate"))).norm()) for a in (4e-3, 2e-3, 1e-3)]
    assert gaps[0] / gaps[1] == pytest.approx(4, abs=0.3) and gaps[1] / gaps[2] == pytest.approx(4, abs=0.3)


def test_first_order_expansions():
    net, batch, n = Smooth(5), images(seed=3), 3
    ev = dil._Evaluator(net, mse)
    shapes = [p.shape for p in ev.theta]
    unflat = lambda f: [part.view(s) for part, s in zip(f.split([s.numel() for s in shapes]), shapes)]
    at = torch.cat([t.reshape(-1) for t in ev.theta])
    g = [torch.cat([t.reshape(-1) for t in ev.grad(ev.theta, [(1.0, x, y)], 0)[1]]) for x, y in zip(batch.x, batch.y)]
    H = [torch.autograd.functional.hessian(lambda f, x=x, y=y: ev.loss(unflat(f), x, y), at) for x, y in zip(batch.x, batch.y)]
    gbar, Hbar = sum(g) / n, sum(H) / n
    shift = {"sf": sum(H[k] @ g[j] for j in range(n) for k in range(n) if j != k) / (2 * n), "pf": Hbar @ gbar / 2, "ps": 2 * Hbar @ gbar, "ss": 2 * Hbar @ gbar}

    def error(variant, alpha):
        run = lambda **kw: flat(find(variant, alpha, net=net, support=batch, **kw))
        found = sum(run(order=o) for o in permutations(range(n))) / math.factorial(n) if variant == "sf" else run()
        return float((found - gbar + alpha * shift[variant]).norm())
    for variant in shift:
        assert error(variant, 2e-3) / error(variant, 1e-3) == pytest.approx(4, abs=0.25), variant


def test_one_confounder_and_equal_confounders():
    one, query = images(1, seed=1), images(1, seed=2)
    ps = flat(find("ps", support=one, query=query))
    for variant in ("ss", "ss_same", "ss_chain"):
        torch.testing.assert_close(flat(find(variant, support=one, query=query)), ps, rtol=0, atol=1e-12)
    torch.testing.assert_close(flat(find("sf", support=one)), flat(find("erm", support=one)), rtol=0, atol=1e-12)
    copies = ConfounderBatch(one.x * 3, one.y * 3, list("abc"))
    torch.testing.assert_close(flat(find("ss", 0.3, support=copies)), flat(find("ps", 0.3, support=copies)), rtol=0, atol=1e-12)
    torch.testing.assert_close(flat(find("sf", 0.3, support=copies)), flat(find("pf", 0.3, support=copies, inner_steps=3)), rtol=0, atol=1e-12)


def test_permuting_confounders():
    batch = images(seed=1)
    turned = ConfounderBatch(batch.x[::-1], batch.y[::-1], batch.names[::-1])
    for variant in ("pf", "ps", "ss"):
        torch.testing.assert_close(flat(find(variant, support=turned)), flat(find(variant, support=batch)), rtol=0, atol=1e-12)
    assert (flat(find("sf", support=turned, order=(0, 1, 2))) - flat(find("sf", support=batch, order=(0, 1, 2)))).norm() > 1e-4
    torch.testing.assert_close(flat(find("sf", support=turned, order=(2, 1, 0))), flat(find("sf", support=batch, order=(0, 1, 2))), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["erm", "sf", "pf", "ps", "ss", "ss_chain"])
@pytest.mark.parametrize("micro", [1, 2, 3, 4])
def test_micro_batches_are_exact(variant, micro):
    kw = dict(support=images(batch=4, seed=1), query=images(batch=4, seed=2), order=(0, 2, 1))
    torch.testing.assert_close(flat(find(variant, micro_batch=micro, **kw)), flat(find(variant, **kw)), rtol=0, atol=1e-12)


def test_vmap_branches_equal_the_loop():
    kw = dict(support=images(seed=1), query=images(seed=2))
    for loss in (mse, charbonnier):
        a, b = find("ss", loss=loss, **kw), find("ss", loss=loss, branches="vmap", **kw)
        torch.testing.assert_close(flat(b), flat(a), rtol=0, atol=1e-12)
        assert (a.n_grad_images, a.n_hvp, a.n_hvp_images) == (b.n_grad_images, b.n_hvp, b.n_hvp_images)
        torch.testing.assert_close(torch.stack([a.support_loss, a.query_loss, a.cos_erm]), torch.stack([b.support_loss, b.query_loss, b.cos_erm]))


def test_l1_has_no_gauss_newton_term():
    "For a linear model with L1 the Hessian vanishes almost everywhere: second order is first order (pitfall 1)."
    net, kw = nn.Conv2d(1, 1, 3, padding=1, dtype=f64), dict(support=images(seed=1), query=images(seed=2))
    torch.testing.assert_close(flat(find("ps", net=net, loss=l1, **kw)), flat(find("ps_fo", net=net, loss=l1, **kw)), rtol=0, atol=1e-14)
    assert (flat(find("ps", net=net, loss=mse, **kw)) - flat(find("ps_fo", net=net, loss=mse, **kw))).norm() > 1e-3


def test_counters_follow_the_cost_table():
    "Section 4.5: gradient evaluations in images and Hessian-vector products, n = 3, B = 2."
    support, query, nB = images(seed=1), images(seed=2), 6
    want = {"erm": (nB, 0, 0), "sf": (nB, 0, 0), "pf": (2 * nB, 0, 0), "ps": (2 * nB, 1, nB), "ss": (nB + 3 * nB, 3, nB), "ss_same": (2 * nB, 3, nB), "ss_chain": (2 * nB, 3, nB),
            "ps_fo": (2 * nB, 0, 0)}
    for variant, counts in want.items():
        for hvp in ("explicit", "finite_difference") + (("autograd",) if variant in ("ps", "ss", "ss_chain") else ()):
            d = find(variant, support=support, query=query, hvp=hvp)
            assert (d.n_grad_images, d.n_hvp, d.n_hvp_images) == counts, (variant, hvp)


def test_cosine_with_erm():
    batch = images(seed=1)
    assert float(find("erm", support=batch).cos_erm) == pytest.approx(1)
    assert find("sf", support=batch).cos_erm is None
    for variant in ("sf", "pf", "ps", "ss"):
        d = find(variant, 0.2, support=batch, diagnose=True)
        e = flat(find("erm", support=batch))
        assert float(d.cos_erm) == pytest.approx(float(torch.dot(flat(d), e) / flat(d).norm() / e.norm()), abs=1e-9)


# --- state, odd networks ----------------------------------------------------------------------------------------------------------
class Odd(nn.Module):
    "BatchNorm, dropout, a tied, a frozen and an unused parameter, an in-place activation."
    def __init__(self, dropout=0.3, norm=True):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.third.weight = self.second.weight
        self.norm, self.drop = nn.BatchNorm2d(4) if norm else nn.Identity(), nn.Dropout2d(dropout)
        self.last = nn.Conv2d(4, 3, 1)
        self.last.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        h = F.relu_(self.norm(self.first(x)))
        h = torch.tanh(self.third(torch.tanh(self.second(self.drop(h)))))
        return x + self.last(h)


def snapshot(net):
    return copy.deepcopy({"state": net.state_dict(), "grad": {n: p.grad for n, p in net.named_parameters()}, "mode": [m.training for m in net.modules()],
                          "rng": torch.get_rng_state(), "requires": [p.requires_grad for p in net.parameters()]})


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return all(equal(a[k], b[k]) for k in a)
    return a == b


@pytest.mark.parametrize("hvp", ["explicit", "autograd", "jvp", "finite_difference"])
@pytest.mark.parametrize("variant", ["erm", "sf", "pf", "ps", "ss", "ss_chain"])
def test_the_model_is_left_as_it_was(variant, hvp):
    torch.manual_seed(0)
    net = Odd()
    net.norm.eval()
    for p in net.parameters():
        p.grad = torch.full_like(p, 7.0)
    net.norm.train()
    net.drop.eval()
    before = snapshot(net)
    batch = images(channels=3, dtype=torch.float32)
    copies = [x.clone() for x in batch.x]
    d = find(variant, net=net, support=batch, hvp=hvp)
    assert equal(before, snapshot(net)) and all(map(torch.equal, copies, batch.x))
    assert set(d.grads) == {n for n, p in net.named_parameters() if p.requires_grad} and "third.weight" not in d.grads
    assert not d.grads["unused"].any() and all(g.isfinite().all() and not g.requires_grad for g in d.grads.values())


def test_deterministic_given_the_generator_with_dropout():
    torch.manual_seed(1)
    net, batch = Odd(0.5), images(channels=3, dtype=torch.float32)
    run = lambda seed, variant: flat(find(variant, net=net, support=batch, generator=torch.Generator().manual_seed(seed)))
    for variant in ("erm", "sf", "ps", "ss"):
        torch.manual_seed(10)
        first = run(3, variant)
        torch.manual_seed(11)
        assert torch.equal(first, run(3, variant)) and not torch.equal(first, run(4, variant))


def test_hessian_product_sees_the_same_dropout_mask():
    "The explicit way back must re-draw the inner step's masks: it then equals the graph kept by autograd."
    torch.manual_seed(2)
    net, batch = Odd(0.5, norm=False).double(), images(channels=3)
    for variant in ("ps", "ss"):
        a, b = (flat(find(variant, 0.1, net=net, support=batch, hvp=h, generator=torch.Generator().manual_seed(3))) for h in ("explicit", "autograd"))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_tied_parameters_get_the_whole_gradient():
    torch.manual_seed(3)
    net, batch = Odd(0.0, norm=False).double(), images(2, channels=3)
    found = find("erm", net=net, support=batch).grads["second.weight"]
    net.zero_grad()
    mse(net(torch.cat(batch.x)), torch.cat(batch.y)).backward()
    torch.testing.assert_close(found, net.second.weight.grad, rtol=0, atol=1e-14)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Conv2d(3, 24, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, -1)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.out(h.transpose(1, 2).reshape(len(x), 8, *x.shape[-2:]))


@pytest.mark.parametrize("hvp", ["explicit", "autograd", "jvp"])
def test_attention(hvp):
    torch.manual_seed(4)
    net, kw = Attention().double(), dict(support=images(channels=3), query=images(channels=3, seed=5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a = flat(find("ps", 0.5, net=net, hvp=hvp, **kw))
    torch.testing.assert_close(a, flat(find("ps", 0.5, net=net, hvp="finite_difference", **kw)), rtol=0, atol=1e-7)


def test_batchnorm_statistics_are_refreshed_once_per_step():
    torch.manual_seed(5)
    net = Odd(0.0)
    strategy = DIL(net, variant="ps", alpha=1e-3)
    batch, opt = toy_batch(), torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.0)
    before = copy.deepcopy(net.norm.state_dict())
    loss = strategy(batch)
    assert equal(before, net.norm.state_dict())
    loss.backward()
    opt.step()
    strategy.after_step()
    assert int(net.norm.num_batches_tracked) == 1
    # the statistics are those of the mixed query batch at the new parameters (the rate is 0: at theta)
    x = strategy.confounders.sample(batch["clean"], generator=strategy_generator(0, 0, 0)).split(2)[1].x
    torch.testing.assert_close(net.norm.running_mean, 0.1 * net.first(torch.cat(x)).mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    off = DIL(Odd(), variant="sf", bn="off")
    off(batch).backward()
    off.after_step()
    assert int(off.net.norm.num_batches_tracked) == 0


def strategy_generator(seed, step, call):
    from irnb.strategies.strategy import mix_seed
    return torch.Generator().manual_seed(mix_seed(seed, step, call, 0))


def test_concat_and_separate_differ_under_batchnorm_only():
    torch.manual_seed(6)
    batch = images(channels=3)
    batch.x[1].mul_(3)
    for norm, same in ((True, False), (False, True)):
        net = Odd(0.0, norm).double()
        a, b = (flat(find("erm", net=net, support=batch, mixed=m)) for m in ("concat", "separate"))
        assert torch.allclose(a, b, atol=1e-12) == same


# --- degeneracies of the whole loop -----------------------------------------------------------------------------------------------
def weights(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def train(strategy, optimiser, steps, size=8):
    for step in range(steps):
        optimiser.zero_grad()
        strategy(toy_batch(2, size, seed=100 + step // 4 if isinstance(strategy, DIL) and strategy.base in ("lookahead", "erm_sequential") else 100 + step)).backward()
        optimiser.step()
        strategy.after_step()
    return weights(strategy.net)


class Fixed:
    "A degradation without randomness."
    def __init__(self, gain):
        self.name, self.gain = f"gain_{gain}", gain

    def __call__(self, clean, *, generator):
        return clean * self.gain


GAINS = [Fixed(0.5), Fixed(0.7), Fixed(1.1), Fixed(1.3)]


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_sf_with_sgd_is_sequential_sgd_or_lookahead(rate):
    "SGD inside, SGD outside on the raw displacement: sequential SGD at rate 1, Lookahead(rate, n) below (section 4.4)."
    lr = 0.05
    sf = DIL(ToyNet().double(), GAINS, variant="sf", alpha=lr, normalize=False, loss="mse", seed=3)
    a = train_double(sf, torch.optim.SGD(sf.parameters(), lr=rate), 3)
    control = "erm_sequential" if rate == 1 else "lookahead"
    other = DIL(ToyNet().double(), GAINS, variant=control, loss="mse", seed=3, slow_rate=rate)
    b = train_double(other, torch.optim.SGD(other.parameters(), lr=lr), 12)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert (a - weights(ToyNet().double())).norm() > 1e-3


def train_double(strategy, optimiser, steps):
    per = len(strategy.confounders) if strategy.base in ("lookahead", "erm_sequential") else 1
    for step in range(steps):
        batch = {k: v.double() for k, v in toy_batch(2, 8, seed=step // per).items()}
        optimiser.zero_grad()
        strategy(batch).backward()
        optimiser.step()
        strategy.after_step()
    return weights(strategy.net)


def test_released_preset_is_a_hand_written_chain():
    "Inner Adam (lr 1e-4, betas (0, 0.999), persistent), raw difference, outer Adam, different contents, NumPy's order."
    net = ToyNet().double()
    strategy = DIL.released(net, GAINS)
    outer = torch.optim.Adam(strategy.parameters(), lr=1e-4)
    meta, task = ToyNet().double(), ToyNet().double()
    meta_opt = torch.optim.Adam(meta.parameters(), lr=1e-4)
    task_opt = torch.optim.Adam(task.parameters(), lr=1e-4, betas=(0.0, 0.999))
    state, order = np.random.RandomState(1), list(range(4))
    for step in range(5):
        clean = toy_batch(8, 8, seed=step)["clean"].double()
        outer.zero_grad()
        strategy({"clean": clean}).backward()
        outer.step()
        strategy.after_step()
        state.shuffle(order)
        task.load_state_dict(meta.state_dict())
        for i in order:
            part = clean[2 * i:2 * i + 2]
            task_opt.zero_grad()
            F.l1_loss(task(part * GAINS[i].gain), part).backward()
            task_opt.step()
        for m, t in zip(meta.parameters(), task.parameters()):
            m.grad = m.detach() - t.detach()
        meta_opt.step()
    torch.testing.assert_close(weights(net), weights(meta), rtol=0, atol=1e-13)
    assert strategy.inner.steps == 20
    assert RELEASED["alpha"] == 1e-4 and strategy.inner.betas == (0.0, 0.999) and not strategy.counterfactual


def test_inner_state_reset_is_another_method():
    runs = {}
    for state in ("persist", "reset"):
        s = DIL(ToyNet().double(), GAINS, inner="adam", inner_state=state, alpha=1e-3, loss="mse")
        runs[state] = train_double(s, torch.optim.SGD(s.parameters(), lr=0.1), 3)
        assert (s.inner.steps == 12) == (state == "persist")
    assert (runs["persist"] - runs["reset"]).norm() > 1e-6


def test_released_order_is_numpys():
    state, order = np.random.RandomState(1), list(range(5))
    for step in range(7):
        state.shuffle(order)
        assert released_order(5, step) == order
    assert released_order(5, 3690 + 2) == released_order(5, 2)


def test_orders_cover_all_confounders_in_turn():
    s = DIL(ToyNet(), variant="erm_sequential")
    seen = []
    for step in range(8):
        s.step = step
        seen.append(dil._permutation(s)[0])
    assert sorted(seen[:4]) == sorted(seen[4:]) == [0, 1, 2, 3]


def test_random_orders_are_drawn_anew_in_every_step_and_are_all_met():
    s, found = DIL(ToyNet(), variant="sf"), []
    for step in range(400):
        s.step = step
        found.append(tuple(dil._permutation(s)))
    counts = [found.count(p) for p in permutations(range(4))]
    assert sum(counts) == 400 and min(counts) > 3 and max(counts) < 40          # 16.7 expected of each
    assert [tuple(dil._permutation(DIL(ToyNet(), variant="sf", seed=k))) for k in range(12)] != [found[0]] * 12
    g = torch.Generator().manual_seed(0)
    drawn = {tuple(find("sf", generator=g).losses) for _ in range(60)}
    assert len(drawn) == 6


def test_all_variants_of_a_seed_see_the_same_noise():
    "Degradations are drawn for the whole batch before it is divided, so erm, sf, pf and ps share their images."
    batch = toy_batch()
    draw = lambda v: dil._batches(DIL(ToyNet(), variant=v), batch, strategy_generator(0, 0, 0))
    whole, (support, (query,)) = draw("sf")[0], draw("ps")
    for x, a, b in zip(whole.x, support.x, query.x):
        assert torch.equal(x, torch.cat([a, b]))


# --- strategy ---------------------------------------------------------------------------------------------------------------------
SETTINGS = {**{v: {"variant": v, **({"inner_steps": 2} if v.startswith("pf") else {})} for v in VARIANTS}, "adam": {"inner": "adam", "alpha": 1e-3}, "released": RELEASED, "vmap": {"variant": "ss", "branches": "vmap"},
            "fresh": {"variant": "ps", "query": "fresh"}, "reuse": {"variant": "ss_same", "query": "reuse"}, "micro": {"variant": "ps", "micro_batch": 3}}


def plain(net):
    return DIL(net, 2, variant="erm", loss="l1")


@pytest.mark.parametrize("name", list(SETTINGS))
def test_contract(name):
    options = SETTINGS[name]
    # one convolutional net suffices for the combinations; sf and ps also meet NAFNet
    nets = None if name in ("sf", "ps") else [ToyNet]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        contract(lambda net: DIL(net, **options), reduced=plain, options=options, nets=nets, processes=False)


@pytest.mark.parametrize("variant", ["erm", "sf", "pf", "ps", "ss_chain", "lookahead"])
def test_two_processes_agree(variant):
    "Paired types without noise: two processes with half the batch each equal one process."
    contract(lambda net: DIL(net, 2, variant=variant, alpha=0.05, query="reuse" if variant in ("ps", "ss_chain", "pf") else "independent"), nets=[ToyNet], processes=True, same_as_one=True)


def test_two_processes_with_random_confounders():
    contract(lambda net: DIL(net, variant="ps", alpha=0.05), nets=[ToyNet], processes=True, same_as_one=False)


def test_erm_is_supervised_bit_for_bit():
    from irnb.strategies.strategy import _loop
    for loss in ("l1", "mse", "charbonnier"):
        a, b = DIL(ToyNet(), 4, variant="erm", loss=loss), Supervised(ToyNet(), loss)
        _loop(a, [toy_batch(seed=i) for i in range(5)])
        _loop(b, [toy_batch(seed=i) for i in range(5)])
        assert torch.equal(weights(a.net), weights(b.net))


def test_counterfactual_or_different_contents():
    clean, g = toy_batch(8)["clean"], lambda: torch.Generator().manual_seed(0)
    same, other = gaussian_noise().sample(clean, generator=g()), gaussian_noise().sample(clean, generator=g(), counterfactual=False)
    assert all(y is clean for y in same.y) and [len(x) for x in same.x] == [8] * 4
    assert torch.equal(torch.cat(other.y), clean) and [len(x) for x in other.x] == [2] * 4
    s = DIL(ToyNet(), counterfactual=False)
    s({"clean": clean})
    assert s._pending["cost"]["grad_images"] == 8


def test_independent_query_from_the_batch():
    batch = toy_batch()
    s = DIL(ToyNet(), variant="ps")
    support, (query,) = dil._batches(s, batch | {"query": batch["clean"].flip(0)}, strategy_generator(0, 0, 0))
    assert torch.equal(support.y[0], batch["clean"]) and torch.equal(query.y[0], batch["clean"].flip(0))
    support, (query,) = dil._batches(s, batch, strategy_generator(0, 0, 0))
    assert torch.equal(support.y[0], batch["clean"][:2]) and torch.equal(query.y[0], batch["clean"][2:])
    support, (query,) = dil._batches(DIL(ToyNet(), variant="ps", query="fresh"), batch, strategy_generator(0, 0, 0))
    assert query.y[0] is support.y[0] and not torch.equal(query.x[0], support.x[0])
    assert dil._batches(DIL(ToyNet(), variant="ps", query="reuse"), batch, strategy_generator(0, 0, 0))[1] == []


def test_counters_and_logs():
    s = DIL(ToyNet(), variant="ps")
    s(toy_batch()).backward()
    s.after_step()
    assert s.counters == {"steps": 1, "skipped": 0, "grad_images": 16, "hvps": 1, "hvp_images": 8}
    assert {"task_loss", "loss_phi", "cos_erm"} <= set(s.logs)
    t = DIL(ToyNet(), variant="sf")
    t(toy_batch())
    assert {"task_loss", "loss_sigma_5", "loss_sigma_20"} <= set(t.logs)


# --- confounder sets --------------------------------------------------------------------------------------------------------------
SINGLE = ("derain", "derain_domains", "sr4")   # they train on one setting


def test_confounders_of_a_task_are_the_tasks_own():
    "By the task's name, which `confounders: $task` gives, DIL trains on the task's training distribution in even parts."
    from irnb.data import TASKS
    clean, named = toy_batch(2, 32)["clean"], [name for name in TASKS if name not in SINGLE]
    assert len(named) >= 12
    for name in named:
        found = pick_confounders(name)
        assert dict(zip(found.names, found.items)) == dict(TASKS[name].confounders) and len(found) >= 3 and found.weights is None
        b = found.sample(clean, generator=torch.Generator().manual_seed(0))
        assert all(x.isfinite().all() and x.shape[-1] * TASKS[name].scale == 32 for x in b.x)


@pytest.mark.parametrize("name", SINGLE)
def test_a_task_with_one_training_setting_refuses_dil(name):
    with pytest.raises(ValueError, match=f"'{name}'.*derain_mixed"):
        DIL(ToyNet(), name)
    with pytest.raises(ValueError, match=name):
        task_confounders(name)


def test_tasks_of_the_committed_experiments_keep_their_confounders():
    "The same objects and names as the sets that the committed results were made with, so the same bits."
    for name, kept in (("denoise", gaussian_noise()), ("deblur", gaussian_blur()), ("hybrid", hybrid())):
        assert pick_confounders(name).items == kept.items and pick_confounders(name).names == kept.names


def test_presets():
    assert [d.sigma for d in gaussian_noise().items] == [5, 10, 15, 20] and [d.sigma for d in gaussian_blur().items] == [1, 2, 3, 4]
    assert [d.kernel_size for d in gaussian_blur().items] == [21] * 4
    assert [d.family for d in rain_families().items] == ["did", "rain14000", "heavy"] if hasattr(rain_families().items[0], "family") else True
    assert [(d.level, d.stratum, d.strata) for d in hybrid().items] == [("severe", i, 4) for i in range(4)]
    assert sorted(p.pattern for p in pick_confounders("bayer_noise").items) == sorted(deg.BAYER)


def test_strata_partition_the_level():
    parts = [deg.hybrid_bins("severe", i, 4) for i in range(4)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(deg.hybrid_bins("severe"))


def test_real_esrgan_modes_differ_in_what_dominates():
    whole, blur, noise, jpeg = real_esrgan(2).items
    assert blur.first.sigma.low > noise.first.sigma.low and noise.first.noise.low > jpeg.first.noise.low
    assert jpeg.first.quality.high < blur.first.quality.high and jpeg.second.quality.high < blur.second.quality.high
    assert [d.order for d in real_esrgan(1).items] == [1] * 4 and whole.scale == 4


def test_a_mixture_trains_a_x4_network():
    net = build("NAFNet", preset="tiny", upscale=4)
    clean = F.interpolate(toy_batch(2, 8)["clean"], 64)
    s = DIL(net, "sr4_mixed", variant="sf")
    s({"clean": clean}).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_dataset_types():
    types = dataset_types("did", "rain14000", "heavy")
    x = torch.arange(6.).view(6, 1, 1, 1)
    b = types.group(x, -x)
    assert [t.flatten().tolist() for t in b.x] == [[0, 3], [1, 4], [2, 5]] and b.names == ["did", "rain14000", "heavy"]
    assert b.mixed()[0] is x


def test_sampling_is_deterministic_and_leaves_the_clean_images():
    clean = toy_batch(2, 32)["clean"]
    kept = clean.clone()
    for what in PRESETS:
        if what == "types":
            continue
        a, b = (pick_confounders(what).sample(clean, generator=torch.Generator().manual_seed(5)) for _ in range(2))
        assert all(map(torch.equal, a.x, b.x)) and torch.equal(clean, kept)


# --- bad input --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options, words", [
    ({"alpha": 0.0}, "alpha"), ({"alpha": -1.0}, "alpha.*-1"), ({"alpha": math.nan}, "alpha"), ({"alpha": "big"}, "alpha"),
    ({"variant": "pf", "inner_steps": 1}, "pf.*inner_steps"), ({"variant": "sff"}, "variant.*sff"), ({"inner_steps": 0}, "inner_steps"),
    ({"confounders": 1}, "confounders.*type_0"), ({"confounders": [deg.GaussianNoise(5)]}, "confounders.*_5"), ({"confounders": "fog"}, "confounders.*fog"),
    ({"confounders": 3.5}, "confounders"), ({"query": "none"}, "query"), ({"inner": "rmsprop"}, "inner"), ({"variant": "ps", "inner": "adam"}, "inner.*'ps'"),
    ({"inner_state": "x"}, "inner_state"), ({"order": "x"}, "order"), ({"bn": "x"}, "bn"), ({"hvp": "exact"}, "hvp"), ({"outer": "same"}, "outer"),
    ({"variant": "sf", "first_order": "fomaml"}, "fomaml"), ({"slow_rate": 0}, "slow_rate"), ({"max_skips": 0}, "max_skips"), ({"momentum": 1}, "momentum"),
    ({"loss": "l3"}, "loss.*l3"), ({"variant": "pf_branch", "inner_steps": 1}, "pf.*inner_steps")])
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        DIL(ToyNet(), **options)


def test_bad_batches():
    clean = toy_batch(3)["clean"]
    with pytest.raises(ValueError, match="sigma_5.*3.*query="):
        DIL(ToyNet(), variant="ps")({"clean": clean})
    with pytest.raises(ValueError, match="counterfactual=False.*4.*3"):
        DIL(ToyNet(), counterfactual=False)({"clean": clean})
    with pytest.raises(ValueError, match="PairedTypes.*2.*3"):
        DIL(ToyNet(), 2)({"degraded": clean, "clean": clean})
    with pytest.raises(ValueError, match=r"\[3, 2\].*mixed="):
        ConfounderBatch([clean, clean[:2]], [clean, clean[:2]], ["a", "b"]).mixed()
    with pytest.raises(ValueError, match="ConfounderBatch.*'b'.*0"):
        ConfounderBatch([clean, clean[:0]], [clean, clean[:0]], ["a", "b"])
    with pytest.raises(ValueError, match="ConfounderBatch.*1, 0.*1"):
        ConfounderBatch([clean], [], ["a"])
    with pytest.raises(ValueError, match="weights.*-1"):
        ConfounderSet([deg.GaussianNoise(5)] * 2, weights=[1, -1])
    with pytest.raises(ValueError, match="order.*5"):
        find("sf", order=(0, 5))
    with pytest.raises(ValueError, match="query='independent'"):
        DIL(ToyNet(), 2, variant="ps", query="fresh")({"degraded": clean[:2], "clean": clean[:2]})


def test_unequal_batches_weight_by_confounder_when_separate():
    batch = ConfounderBatch([torch.rand(3, 1, 6, 6, dtype=f64), torch.rand(1, 1, 6, 6, dtype=f64)], [torch.rand(3, 1, 6, 6, dtype=f64), torch.rand(1, 1, 6, 6, dtype=f64)], ["a", "b"])
    G = flat(find("erm", support=batch, mixed="separate"))
    parts = [flat(find("erm", support=ConfounderBatch([x], [y], ["a"]))) for x, y in zip(batch.x, batch.y)]
    torch.testing.assert_close(G, sum(parts) / 2, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match=r"\[3, 1\].*mixed="):
        find("ps", support=batch)


def test_a_network_that_writes_into_its_input():
    class Spoils(nn.Conv2d):
        def forward(self, x):
            return super().forward(x.clamp_(0.2, 0.8))
    with pytest.raises(ValueError, match="Spoils.*input"):
        DIL(Spoils(3, 3, 1))(toy_batch())


def test_no_trainable_parameter():
    with pytest.raises(ValueError, match="Smooth.*trainable"):
        find("erm", net=Smooth().requires_grad_(False))


def test_wrong_output_size_is_named():
    with pytest.raises(ValueError, match=r"22, 22.*batch\['clean'\]"):
        DIL(nn.Conv2d(3, 3, 3))(toy_batch())


class Explodes(nn.Module):
    "NaN as soon as `bad` is set."
    def __init__(self):
        super().__init__()
        self.net, self.bad = ToyNet(), False

    def forward(self, x):
        return self.net(x) * (math.nan if self.bad else 1.0)


@pytest.mark.parametrize("variant", ["sf", "ps", "erm"])
def test_non_finite_steps_are_skipped_counted_and_stop_the_run(variant):
    strategy = DIL(Explodes(), variant=variant, max_skips=3)
    opt = torch.optim.AdamW(strategy.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        opt.zero_grad(); strategy(toy_batch()).backward(); opt.step(); strategy.after_step()
    kept, moments = weights(strategy.net), copy.deepcopy(opt.state_dict()["state"])
    strategy.net.bad = True
    for _ in range(3):
        opt.zero_grad()
        loss = strategy(toy_batch())
        assert not bool(loss.isfinite()) and not bool(strategy.logs["task_loss"].isfinite())   # not the loss of an earlier step
        loss.backward()
        opt.step()
        strategy.after_step()
    assert torch.equal(weights(strategy.net), kept) and strategy.counters["skipped"] == 3 and strategy.counters["steps"] == 2
    assert all(equal(moments[k], v) for k, v in opt.state_dict()["state"].items())
    with pytest.raises(FloatingPointError, match=r"alpha.*\b4\b"):
        strategy(toy_batch())
    strategy.net.bad = False
    opt.zero_grad(); strategy(toy_batch()).backward(); opt.step(); strategy.after_step()
    assert strategy._skips == 0 and not torch.equal(weights(strategy.net), kept)


def test_the_training_loop_survives_a_skipped_step():
    from irnb.training import TrainConfig, train as run_training
    class Once(Explodes):
        calls = 0
        def forward(self, x):
            self.calls += 1
            self.bad = 6 <= self.calls < 9 and self.training   # the second step, from its first virtual step on
            return super().forward(x)
    class Batches:
        def batch(self, step):
            return toy_batch(seed=step)
    strategy = DIL(Once(), variant="sf")
    result = run_training(strategy, Batches(), TrainConfig(steps=4, log_every=2, warmup=1), device="cpu", progress=False)
    assert strategy.counters["skipped"] == 1 and strategy.counters["steps"] == 3 and len(result.history) == 2


@pytest.mark.parametrize("variant", ["sf", "pf", "ps", "ss", "ss_chain", "erm", "erm_sequential", "lookahead"])
@pytest.mark.parametrize("pixels", [1, None], ids=["one NaN", "all NaN"])
def test_a_batch_that_is_not_finite_shows_in_the_loss(variant, pixels):
    "Also after good steps, whose loss must not be shown again; nothing moves."
    strategy = DIL(ToyNet(), variant=variant)
    strategy(toy_batch()).backward()
    strategy.after_step()
    batch, kept = toy_batch(seed=1), weights(strategy.net)
    batch["clean"].flatten()[:pixels] = math.nan
    strategy.net.zero_grad()
    loss = strategy(batch)
    loss.backward()
    assert not bool(loss.isfinite()) and not bool(strategy.logs["task_loss"].isfinite()) and float(strategy.logs["skipped"]) == 1
    assert all(p.grad is None for p in strategy.net.parameters()) and torch.equal(weights(strategy.net), kept)
    strategy.after_step()
    assert bool(strategy.loss_theta.isfinite())


@pytest.mark.parametrize("entry", ["degraded", "clean"])
@pytest.mark.parametrize("variant", ["sf", "ps", "ss", "erm_sequential", "lookahead"])
def test_a_nan_in_one_type_of_a_paired_batch_shows_in_the_loss(variant, entry):
    for place in (0, 1):   # whichever type comes first in the chain
        batch = toy_batch()
        batch[entry] = batch[entry].clone()
        batch[entry][place, 0, 0, 0] = math.nan
        assert not bool(DIL(ToyNet(), 2, variant=variant)(batch).isfinite())


def test_a_virtual_step_that_explodes_shows_the_loss_at_theta():
    "The batch is good, so the loss is that of the network on it, measured in this step."
    class Second(Explodes):
        calls = 0
        def forward(self, x):
            self.calls += 1
            self.bad = self.calls > 1
            return super().forward(x)
    good, bad = DIL(ToyNet(), variant="ps"), DIL(Second(), variant="ps")
    expected, found = good(toy_batch()), bad(toy_batch())
    assert float(bad.logs["skipped"]) == 1 and torch.equal(found.detach(), expected.detach())
    assert torch.equal(bad.logs["loss_phi"], bad.logs["task_loss"])


def test_training_stops_where_the_network_fails_at_theta():
    "Not the virtual step but the network itself is broken from the fourth step on: four evaluations in each."
    from irnb.training import NonFiniteError, TrainConfig, train as run_training
    class Breaks(Explodes):
        calls = 0
        def forward(self, x):
            self.calls += 1
            self.bad = self.calls > 12 and self.training
            return super().forward(x)
    class Batches:
        def batch(self, step):
            return toy_batch(seed=step)
    with pytest.raises(NonFiniteError) as caught:
        run_training(DIL(Breaks()), Batches(), TrainConfig(steps=6, log_every=2, warmup=1), device="cpu", progress=False)
    assert caught.value.step == 3


def test_no_check_leaves_it_to_the_loop():
    strategy = DIL(Explodes(), variant="sf", max_skips=None)
    strategy.net.bad = True
    assert bool(strategy(toy_batch()).isnan())


def test_l1_with_second_order_warns():
    with pytest.warns(UserWarning, match="L1.*loss='charbonnier'"):
        DIL(ToyNet(), variant="ps", loss="l1")


def test_theta_phi_gap_warns_once():
    s = DIL(ToyNet(), variant="ps")
    s.loss_theta.fill_(1.0), s.loss_phi.fill_(0.1)
    s.step = 199
    with pytest.warns(UserWarning, match="phi.*alpha"):
        s.after_step()
    s.step = 399
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s.after_step()


def test_vmap_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="branches='loop'"):
        find("ss", net=Odd(), support=images(channels=3, dtype=torch.float32), branches="vmap")


def test_resume_mid_round_of_lookahead():
    "The slow weights of a round that was interrupted are in state_dict()."
    def run(cut):
        s = DIL(ToyNet(), GAINS, variant="lookahead", loss="mse")
        for step in range(10):
            if step == cut:
                fresh = DIL(ToyNet(seed=9), GAINS, variant="lookahead", loss="mse")
                fresh.load_state_dict(s.state_dict())
                s = fresh
            for p in s.net.parameters():
                p.grad = None
            s(toy_batch(seed=step)).backward()
            with torch.no_grad():
                for p in s.net.parameters():
                    p -= 0.1 * p.grad
            s.after_step()
        return weights(s.net)
    assert torch.equal(run(None), run(6))


@pytest.mark.parametrize("options", [{}, {"inner": "adam", "alpha": 1e-3}])
def test_the_extra_state_is_a_tensor_and_old_dictionaries_load(options):
    "Formats for tensors alone take the whole state; what earlier versions stored still resumes."
    strategy = DIL(ToyNet(), **options)
    for step in range(3):
        strategy(toy_batch(seed=step)).backward()
        strategy.after_step()
    state = strategy.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    old = {"step": 3, "counters": dict(strategy.counters), "skips": 0, "inner_steps": strategy.inner.steps if strategy.inner else 0}
    for extra in (state["_extra_state"], state["_extra_state"].float(), old):
        fresh = DIL(ToyNet(seed=1), **options)
        fresh.load_state_dict(state | {"_extra_state": extra})
        assert fresh.step == 3 and fresh.counters == strategy.counters and fresh.counters["grad_images"] > 0
        assert not strategy.inner or fresh.inner.steps == strategy.inner.steps > 0
        assert torch.equal(fresh(toy_batch(seed=9)), strategy(toy_batch(seed=9)))
        strategy._calls = 0
    with pytest.raises(ValueError, match="counters"):
        strategy.set_extra_state(torch.zeros(2))


@pytest.mark.parametrize("count", [0, -3, 10**12])
def test_a_number_of_paired_types_is_bounded(count):
    with pytest.raises(ValueError, match=rf"confounders.* {count}\b"):
        DIL(ToyNet(), count)
