"""Whether the models can be used for text: gateway and scheduler will read the target's tokeniser, chat template and
sampling defaults, and the draft must write in the target's tokens. Checked before anything starts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer

from checkpoint.chat_template import load_chat_template
from checkpoint.errors import LoadError
from checkpoint.generation_config import read_sampling_defaults
from checkpoint.side_files import read_side_files
from checkpoint.token_table import TokenTable
from checkpoint.tokenizer import load_tokenizer
from checkpoint.tokenizer_pair import compare_tokenizers, tokens_from
from cluster.deployment.settings import ModelSettings, Role, Settings
from cluster.errors import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class TextReport:
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()  # what a person should know, though it works


def check_text(settings: Settings, names: Mapping[Role, str]) -> TextReport:
    """`names`: the models as they are written in the deployment file."""
    try:
        target = load_tokenizer(settings.target.folder.path)
        TokenTable(target)
        load_chat_template(settings.target.folder.path)
        read_sampling_defaults(settings.target.folder.path)
    except LoadError as err:
        return TextReport(problems=(_problem("target", names, err),))
    notes = list(_target_notes(settings.target, target))
    if settings.draft is None:
        return TextReport(notes=tuple(notes))
    try:
        notes += [*_pair_notes(target, settings.draft), *_draft_notes(settings.draft, target)]
    except LoadError as err:
        return TextReport(problems=(_problem("draft", names, err),))
    if (lower := settings.draft.lower) is not None:
        try:
            notes += [f"the model beneath the draft: {note}" for note in _pair_notes(target, lower)]
        except LoadError as err:
            value = repr(str(lower.folder.path))
            problem = Problem(path="draft.draft.model", value=value, message=err.message, remedy=err.remedy)
            return TextReport(problems=(problem,))
    return TextReport(notes=tuple(notes))


def _pair_notes(target: Tokenizer, model: ModelSettings) -> tuple[str, ...]:
    """How the tokeniser of a draft differs from the target's. Raises LoadError if it is another one."""
    report = compare_tokenizers(target, load_tokenizer(model.folder.path))
    if report.problem is not None:
        message = f"its tokeniser is not the target's: {report.problem}"
        raise LoadError(message, "use a draft that was trained with the target's tokeniser")
    return tuple(report.notes)


def _problem(role: Role, names: Mapping[Role, str], error: LoadError) -> Problem:
    return Problem(path=f"{role}.model", value=repr(names[role]), message=error.message, remedy=error.remedy)


def _target_notes(model: ModelSettings, tokenizer: Tokenizer) -> Iterator[str]:
    if not model.folder.eos:
        yield (
            "no file of the target names a token that ends a text, so every stream runs to max_tokens or a stop of its "
            "own; set eos_token_id in generation_config.json"
        )
    if moved := list(_moved_tokens(model, tokenizer)):
        yield (
            f"{len(moved)} added tokens of the target have other ids than their file says ({moved[0]}): those that "
            "tokenizer.json lacks are numbered after it in order, as transformers does it"
        )
    vocab_size = model.folder.config.vocab_size
    if beyond := tokens_from(tokenizer, vocab_size):
        yield (
            f"the target's tokeniser has {_counted(beyond)} beyond its vocab_size of {vocab_size}: a prompt that holds "
            "one is refused"
        )


def _moved_tokens(model: ModelSettings, tokenizer: Tokenizer) -> Iterator[str]:
    for wanted, token in read_side_files(model.folder.path).numbered.items():
        got = tokenizer.token_to_id(token.content)
        if got not in (wanted, None):
            yield f"{token.content!r} is {got}, not {wanted}"


def _draft_notes(model: ModelSettings, target: Tokenizer) -> Iterator[str]:
    vocab_size = model.folder.config.vocab_size
    beyond = tokens_from(target, vocab_size)
    if beyond:
        yield (
            f"the draft has no embedding for {_counted(beyond)} of the target (its vocab_size is {vocab_size}): a "
            "stream that holds one gets no drafts from it"
        )


def _counted(tokens: list[str]) -> str:
    return f"1 token ({tokens[0]!r})" if len(tokens) == 1 else f"{len(tokens)} tokens ({tokens[0]!r}, ...)"
