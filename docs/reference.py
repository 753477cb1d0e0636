"""Aurora in one file, in the paper's notation. Read it from top to bottom, or run it: python docs/reference.py

lavis_aurora computes the same, faster and around LAVIS's BLIP; tests/docs/test_reference.py holds the two equal.
Sizes: width d, N adapted matrices ("slots"), rank R, B pairs in a batch, L tokens in a text, K pairs in the queue,
E numbers in the features by which images and texts are compared.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# ---- 1. Mode approximation (paper 3.2) ----


class Factors(nn.Module):
    """U, V, P and lambda, which are trained in place of the backbone.

    The projections W_q, W_k, W_v of every attention in every tower (vision, text, cross-attention), stacked, are one
    tensor W_0, (d, d, N). It stays frozen; its update is a sum of R rank-one tensors, a CP decomposition:

        dW = sum_r lambda_r (u_r o v_r o p_r)                                                            (eq. 2)

    U and V are global: all matrices share them, across modalities. Of its own a matrix has a row of P and one of
    lambda, 2R numbers. Where towers differ in width, there is one U and one V for each width.
    """

    def __init__(self, shapes: list[tuple[int, int]], R: int, scale: float = 8.0) -> None:
        super().__init__()
        self.shapes, self.R, self.scale = shapes, R, scale  # shapes: (d_in, d_out) of each of the N matrices
        d_in, d_out = (sorted(set(widths)) for widths in zip(*shapes))
        self.U = nn.ParameterDict({str(d): nn.Parameter(0.1 * torch.randn(d, R)) for d in d_in})
        self.V = nn.ParameterDict({str(d): nn.Parameter(torch.zeros(d, R)) for d in d_out})  # dW = 0 at the start
        self.P = nn.Parameter(torch.randn(len(shapes), R))
        self.lambda_ = nn.Parameter(torch.ones(len(shapes), R))

    def delta(self, k: int) -> Tensor:
        """dW_ijk = s sum_r lambda_kr u_ir v_jr p_kr (eq. 3), as a matrix (d_in, d_out).

        s is ours: the update is then of one size for all widths and ranks, and one learning rate suits them all.
        """
        d_in, d_out = self.shapes[k]
        U, V = self.U[str(d_in)], self.V[str(d_out)]
        dW = torch.zeros(d_in, d_out)
        for r in range(self.R):
            dW = dW + self.lambda_[k, r] * self.P[k, r] * torch.outer(U[:, r], V[:, r])
        return self.scale / (0.1 * math.sqrt(d_in * self.R)) * dW


class AdaptedLinear(nn.Module):
    """H = X W_0 + b + X dW_k (eq. 4). A layer with q, k and v side by side, as in LAVIS's ViT, has three slots.

    Beyond the paper, so has a feed-forward layer d to 4d four slots d x d, for d outputs each; 4d to d, for d inputs.
    """

    def __init__(self, linear: nn.Linear, factors: Factors, slots: list[int]) -> None:
        super().__init__()
        self.linear, self.factors, self.slots = linear.requires_grad_(False), factors, slots

    def forward(self, X: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out of all slots), or (..., d_in of all slots) to (..., d_out)."""
        deltas = [self.factors.delta(k) for k in self.slots]
        return self.linear(X) + X @ torch.cat(deltas, dim=0 if len(deltas[0]) < X.shape[-1] else 1)


def use(model: nn.Module, factors: Factors) -> None:
    """Let every adapted layer of the model add this set.

    BLIP learns from a momentum teacher, a moving average of the whole model. The average of a frozen backbone is that
    backbone: the teacher is not a second model here, only a second set of factors.
    """
    for layer in model.modules():
        if isinstance(layer, AdaptedLinear):
            layer.factors = factors


@torch.no_grad()
def update_momentum(trained: nn.Module, average: nn.Module, m: float = 0.995) -> None:
    """theta_m <- m theta_m + (1 - m) theta for each parameter: once a step, of the factors and of the heads."""
    for theta, theta_m in zip(trained.parameters(), average.parameters()):
        theta_m.copy_(m * theta_m + (1 - m) * theta)


# ---- 2. Gated query transformation, GQT (paper 3.3) ----


class Gate(nn.Module):
    """Gives a cross-attention layer's output f some of the text t back that entered it; 2d parameters a layer.

        t' = tanh(gamma * t) + beta           g_i = softmax_i( sum_j <f_i, t'_j> )

    residual: f + (1 - g) t' (ours), which at the start, gamma = beta = 0, is f: nothing of the backbone is lost.
    convex: g f + (1 - g) t' (the paper's words), which at the start is f divided by about L.
    """

    def __init__(self, d: int, form: str = "residual") -> None:
        super().__init__()
        self.gamma, self.beta, self.form = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d)), form

    def forward(self, t: Tensor, f: Tensor, is_text: Tensor) -> Tensor:
        """t and f, outputs of self- and cross-attention, (B, L, d); is_text, (B, L), is False at padding."""
        t = torch.tanh(self.gamma * t) + self.beta
        out = []
        for t_b, f_b, is_text_b in zip(t, f, is_text):
            similarity = (f_b @ t_b[is_text_b].T).sum(dim=1)  # of each f_i with the whole text, (L,)
            g = similarity.masked_fill(~is_text_b, -math.inf).softmax(dim=0)[:, None]
            out.append((g * f_b if self.form == "convex" else f_b) + (1 - g) * t_b)
        return torch.stack(out)


def affine_gate(t: Tensor, f: Tensor, gamma_t: Tensor, beta_t: Tensor, gamma_f: Tensor, beta_f: Tensor) -> Tensor:
    """The gate of the authors' released code, 4d numbers a layer; it is added to the output of the whole layer."""
    return 0.1 * (gamma_t * t + beta_t + gamma_f * f + beta_f)


# ---- 3. Informative context enhancement, ICE (paper 3.3) ----


def enhance_context(F: Tensor, T: Tensor, form: str = "attention") -> Tensor:
    """f'_i = f_i + sum_j alpha_ij t_j,  alpha_ij = softmax_j(f_i . t_j)  (eq. 5); in training only.

    F: [ENC] features of the pairs, (pairs, d), right and wrong ones alike: otherwise they would give the label away.
    T: [CLS] features of the batch's texts alone, (B, d). The forms mean and random are the controls of figure 4.
    """
    T = torch.randn_like(T) if form == "random" else T
    out = []
    for f in F:
        alpha = torch.full((len(T),), 1 / len(T)) if form == "mean" else torch.softmax(T @ f, dim=0)
        out.append(f + alpha @ T)
    return torch.stack(out)


# ---- 4. BLIP's losses for retrieval ----


def contrastive_loss(query: Tensor, query_m: Tensor, keys_m: Tensor, same: Tensor, tau: Tensor, a: float) -> Tensor:
    """ITC: each query is to pick its partners among the keys. Unit features (., E); those with _m are the teacher's.

    The target is (1 - a) of what is right, ``same`` (an image may have several texts), and a of the teacher's choice.
    """
    right = same.float() / same.sum(dim=1, keepdim=True)
    target = a * torch.softmax(query_m @ keys_m.T / tau, dim=1).detach() + (1 - a) * right
    return -(target * torch.log_softmax(query @ keys_m.T / tau, dim=1)).sum(dim=1).mean()


@torch.no_grad()
def hard_negatives(similarity: Tensor, ids: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each row a column of another id, the likelier the more similar, and whether there is one; both (B,)."""
    same = ids[:, None] == ids
    weight = torch.softmax(similarity, dim=1).masked_fill(same, 0)
    weight[same.all(dim=1)] = 1  # there is none; what is drawn will not count
    return torch.multinomial(weight, 1, generator=noise)[:, 0], ~same.all(dim=1)


def encode(model, heads: nn.ModuleDict, pixels: Tensor, words: Tensor, is_text: Tensor) -> tuple[Tensor, ...]:
    """Tokens of images and texts, (B, ., d), and their features for ITC, (B, E): the first token, projected."""
    image, text = model.image(pixels), model.text(words, is_text)
    features = heads["image"](image[:, 0]), heads["text"](text[:, 0])
    return (image, text, *(nn.functional.normalize(x, dim=1) for x in features))


def retrieval_losses(
    model, queue: list[Tensor], pixels: Tensor, words: Tensor, is_text: Tensor, ids: Tensor, a: float, noise, m=0.995
) -> tuple[Tensor, Tensor]:
    """ITC and ITM of a batch; one step of training minimizes their sum.

    model: the encoders ``image(pixels)``, ``text(words, is_text)`` and ``fuse(words, is_text, image)``, which is the
        text encoder again with cross-attention, gates, and [ENC] for the first word; ``factors`` and ``heads`` with
        their averages ``factors_m`` and ``heads_m``; ``itm_head``, the temperature ``tau``, the form ``context``.
    queue: the teacher's features of the last K images and of their texts, (K, E), and their ids, (K,).
    a: the teacher's share of the target, from 0 at the start to 0.4 after two epochs.
    """
    model.tau.data.clamp_(0.001, 0.5)
    image, text, image_feat, text_feat = encode(model, model.heads, pixels, words, is_text)
    update_momentum(model.factors, model.factors_m, m)
    update_momentum(model.heads, model.heads_m, m)
    with torch.no_grad():
        use(model, model.factors_m)
        _, _, image_m, text_m = encode(model, model.heads_m, pixels, words, is_text)
        use(model, model.factors)

    images_m, texts_m, all_ids = (torch.cat(pair) for pair in zip((image_m, text_m, ids), queue))
    same = ids[:, None] == all_ids
    itc = contrastive_loss(image_feat, image_m, texts_m, same, model.tau, a) / 2
    itc = itc + contrastive_loss(text_feat, text_m, images_m, same, model.tau, a) / 2
    queue[:] = [torch.cat([old, new])[len(new) :] for old, new in zip(queue, (image_m, text_m, ids))]

    wrong_image, has_image = hard_negatives(text_feat @ image_feat.T / model.tau, ids, noise)
    wrong_text, has_text = hard_negatives(image_feat @ text_feat.T / model.tau, ids, noise)
    # B right pairs, each text with a wrong image, each image with a wrong text.
    F = model.fuse(
        torch.cat([words, words, words[wrong_text]]),
        torch.cat([is_text, is_text, is_text[wrong_text]]),
        torch.cat([image, image[wrong_image], image]),
    )[:, 0]
    logits = model.itm_head(F if model.context == "none" else enhance_context(F, text[:, 0], model.context))
    label = (torch.arange(len(F)) < len(ids)).long()
    counts = torch.cat([torch.ones_like(has_image), has_image, has_text])
    return itc, nn.functional.cross_entropy(logits[counts], label[counts])


# ---- 5. At work ----


def main() -> None:
    """Count what is trained; then learn an update of this kind from nothing but what it does."""
    torch.set_num_threads(1)  # faster for matrices this small
    torch.manual_seed(0)
    for R in (64, 128):
        trained = [Factors([(768, 768)] * 108, R), *(Gate(768) for _ in range(12))]
        count = sum(p.numel() for module in trained for p in module.parameters())
        print(f"BLIP base, 12 layers of width 768, R = {R}: {count:,} = 9L * 2R + 2dR + 2Ld trained numbers")

    shapes, X = [(16, 16)] * 4, torch.randn(256, 16)
    truth, factors = Factors(shapes, R=2, scale=1), Factors(shapes, R=4)
    nn.init.normal_(truth.V["16"])
    layers = [AdaptedLinear(nn.Linear(16, 16), factors, [k]) for k in range(4)]
    wanted = [(layer.linear(X) + X @ truth.delta(k)).detach() for k, layer in enumerate(layers)]
    for step in range(101):
        loss = sum((layer(X) - H).square().mean() for layer, H in zip(layers, wanted)) / 4
        if step % 25 == 0:
            print(f"4 frozen layers of width 16, step {step:3}: squared error {loss.item():.5f}")
        parameters = list(factors.parameters())
        with torch.no_grad():  # steps of one size, as Adam's; torch.optim takes longer to import than all of this
            for theta, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                theta -= 0.03 * (1 - step / 100) * gradient.sign()


if __name__ == "__main__":
    main()
