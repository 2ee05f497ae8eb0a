"""What acts at the input place: GPT-2's learned positions, PyTorch's recurrence, convolution and complex numbers."""

LENGTH, WIDTH = 11, 8


def make():
    """All goldens, as a tree of lists and numbers."""
    import torch

    torch.manual_seed(0)
    return {
        "gpt2": gpt2(),
        "recurrence": recurrence(),
        "convolution": convolution(),
        "phase": phase(),
    }


def gpt2():
    """The input of GPT-2's first layer for a prompt, and for tokens at positions that do not run on."""
    import torch
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        n_embd=WIDTH, n_head=2, n_layer=1, n_positions=LENGTH, vocab_size=13, embd_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2Model(config).eval()
    ids = torch.randint(13, (2, 7))
    scattered = torch.tensor([[0, 2, 3, 5, 7, 9, 10], [4, 4, 1, 0, 10, 6, 8]])

    def first(**keywords):
        return model(ids, output_hidden_states=True, **keywords).hidden_states[0].tolist()

    return {
        "table": model.wpe.weight.tolist(),
        "embeddings": model.wte(ids).tolist(),
        "out": first(),
        "positions": scattered.tolist(),
        "scattered": first(position_ids=scattered),
    }


def recurrence():
    """torch.nn.RNN with tanh, whose input is zero: states 1, 2, 3, ... after a learned state 0."""
    import torch

    rnn = torch.nn.RNN(1, WIDTH, batch_first=True)
    start = torch.randn(1, 1, WIDTH)
    states = rnn(torch.zeros(1, LENGTH - 1, 1), start)[0]
    return {
        "start": start[0, 0].tolist(),
        "kernel": rnn.weight_hh_l0.T.tolist(),
        "bias": (rnn.bias_hh_l0 + rnn.bias_ih_l0).tolist(),
        "states": torch.cat([start, states], dim=1)[0].tolist(),
    }


def convolution():
    """torch.nn.Conv1d with a kernel per channel, padded by zeros and cut to what is causal, beside its input.

    Its last weight is that of the token itself; here it is put first.
    """
    import torch

    layer = torch.nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH, padding=3, bias=False)
    x = torch.randn(2, LENGTH, WIDTH)
    out = x + layer(x.transpose(1, 2))[..., :LENGTH].transpose(1, 2)
    return {"x": x.tolist(), "kernel": layer.weight[:, 0].flip(1).T.tolist(), "out": out.tolist()}


def phase():
    """Embeddings as torch's complex numbers, times exp(i·ω·k)."""
    import torch

    vocabulary, ids = 5, torch.tensor([[3, 0, 3, 1], [4, 4, 2, 0]])
    frequencies = torch.rand(vocabulary, WIDTH // 2)
    x, positions = torch.randn(2, 4, WIDTH), torch.tensor([[0, 1, 2, 3], [9, 1, 1, 17]])
    turn = torch.polar(torch.ones(2, 4, WIDTH // 2), frequencies[ids] * positions[..., None])
    turned = torch.complex(*x.chunk(2, dim=-1)) * turn
    return {
        "frequencies": frequencies.tolist(),
        "ids": ids.tolist(),
        "positions": positions.tolist(),
        "x": x.tolist(),
        "out": torch.cat([turned.real, turned.imag], dim=-1).tolist(),
    }
