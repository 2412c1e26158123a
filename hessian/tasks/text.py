"""The next character of English: sentences of Python's manual, and a small causal transformer trained on them."""

import dataclasses

import torch
from torch import nn
from torch.utils.data import TensorDataset

from hessian.task import Task
from hessian.tasks.accuracy import accuracy, require_accuracy
from hessian.tasks.cache import cached_weights, checksum, shapes
from hessian.tasks.characters import CHARACTERS, encode
from hessian.tasks.language_model import LanguageRecipe, train_language_model
from hessian.tasks.manual import sentences_by_topic
from hessian.tasks.transformer import Transformer

NAME = "text-transformer"
RECIPE = LanguageRecipe()
REQUIRED_ACCURACY = 0.5


def manual_texts() -> tuple[str, str]:
    """Training and test text, in lower case, a sentence a line; of every 100 sentences the last ten are for the test."""
    sentences = list(dict.fromkeys(sentence.lower() for topic in sentences_by_topic().values() for sentence in topic))
    train = [sentence for index, sentence in enumerate(sentences) if index % 100 < 90]
    test = [sentence for index, sentence in enumerate(sentences) if index % 100 >= 90]
    return "\n".join(train), "\n".join(test)


def windows(text: torch.Tensor, context: int) -> TensorDataset:
    """Every `context` symbols of (length,) `text` with the symbols that follow each: pairs of (context,) int64."""
    count = (len(text) - 1) // context
    end = count * context
    return TensorDataset(text[:end].view(count, context), text[1 : end + 1].view(count, context))


def text_transformer(*, pretrained: bool = True, seed: int = 0) -> Task:
    """A causal transformer (423k parameters) on characters of English; training takes some 45 s on two cores."""
    recipe = dataclasses.replace(RECIPE, seed=seed)
    train_text, test_text = (encode(text) for text in manual_texts())
    train, test = windows(train_text, recipe.context), windows(test_text, recipe.context)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(len(CHARACTERS), recipe.context).float()

    def trained() -> nn.Module:
        language_model = train_language_model(model, train_text, recipe, progress=f"training {NAME}")
        require_accuracy(NAME, language_model, test, REQUIRED_ACCURACY)
        return language_model

    if pretrained:
        described = f"{recipe}{shapes(model)}{checksum(train)}"
        model.load_state_dict(cached_weights(f"{NAME}-seed{seed}", described, trained))
    model.eval()
    return Task(model, train, test, nn.CrossEntropyLoss(), accuracy, NAME)
