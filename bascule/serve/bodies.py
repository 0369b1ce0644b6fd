"""Request bodies of the API, as far as bascule speaks OpenAI's dialect; they double as its OpenAPI document.

A field we know but cannot honour is refused, never ignored: a client that asked for tools must not get an answer that pretends
it never asked. Fields that change nothing for one model on one chip (`user`, `store`, `metadata`, ...) are accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
    model_validator,
)

from bascule.infer.sequence import LEAST_TEMPERATURE, Sampling

MAX_STOPS = 4
MAX_CHOICES = 16
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


def _whole(value: object) -> object:
    """1.0 is an integer in JSON Schema, and some clients write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
"""Behind a field's bounds, which would else not stand in the document."""
Whole = Annotated[int, WHOLE]


def _exactly_one(**types: str) -> dict[str, JsonValue]:
    """For the document: one of these fields is there and not null."""
    return {"oneOf": [{"required": [name], "properties": {name: {"type": kind}}} for name, kind in types.items()]}  # fmt: skip


class Body(BaseModel):
    """Unknown keys are refused so that a typing error cannot be a silent default; so are values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Part(BaseModel):
    """A piece of a body: values of another type are refused here too."""

    model_config = ConfigDict(strict=True)


class TextPart(Part):
    type: Literal["text", "input_text", "output_text"]
    text: str


class CalledFunction(Part):
    name: str
    arguments: str


class ToolCall(Part):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ToolFunction(Part):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Part):
    type: Literal["function"]
    function: ToolFunction


class NamedFunction(Part):
    name: str


class NamedTool(Part):
    type: Literal["function"]
    function: NamedFunction


class Schema(Part):
    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextFormat(Part):
    type: Literal["text"]


class JsonFormat(Part):
    type: Literal["json_object"]


class SchemaFormat(Part):
    type: Literal["json_schema"]
    json_schema: Schema


class StructuredOutputs(Part):
    """vLLM's extension: exactly one of these forms."""

    model_config = ConfigDict(
        extra="forbid", protected_namespaces=(),
        json_schema_extra=_exactly_one(json="object", regex="string", choice="array", grammar="string"),
    )  # fmt: skip

    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if len(self.form) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar")
        return self

    @property
    def form(self) -> dict[str, Any]:
        forms = {
            "json": self.json_,
            "regex": self.regex,
            "choice": self.choice,
            "lark": self.grammar,
        }
        return {kind: value for kind, value in forms.items() if value is not None}


class Message(Part):
    """One turn. Reasoning that a client sends back (either spelling) is accepted and left out of the prompt, as R1 asks."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: None = None

    @property
    def text(self) -> str:
        """What the model reads. A call it made stands as the JSON it wrote."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        if self.content is None and self.tool_calls:
            calls = [
                f'{{"name":"{call.function.name}","arguments":{call.function.arguments}}}'
                for call in self.tool_calls
            ]
            return "".join(calls)
        return self.content or ""


class StreamOptions(Part):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Generation(Body):
    """What both kinds of completion share. Extensions of vLLM's API are accepted where they mean the same here."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    structured_outputs: StructuredOutputs | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63), WHOLE] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    user: str | None = None

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and "" in ([value] if isinstance(value, str) else value):
            raise ValueError("a stop string must not be empty")
        return value

    @model_validator(mode="after")
    def _usage_needs_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed only with stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, *, max_tokens: int, seed: int, vocab_size: int) -> Sampling:
        """`seed` is used when the client gave none; a temperature near 0 is greedy, as in vLLM. Raises ValueError for a bias on a token that does not exist."""
        bias = tuple((int(token), value) for token, value in (self.logit_bias or {}).items())
        for token, _ in bias:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"logit_bias: token {token} does not exist; the vocabulary has {vocab_size} tokens"
                )
        warmth = 1.0 if self.temperature is None else self.temperature
        return Sampling(
            temperature=0.0 if warmth < LEAST_TEMPERATURE else warmth,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            max_tokens=max_tokens,
            seed=seed if self.seed is None else self.seed,
            purpose="serve",
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=bias,
        )


class ChatBody(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    response_format: (
        Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] | None
    ) = None
    stamp: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _stamp_needs_the_whole(self) -> Self:
        if self.stamp and self.stream:
            raise ValueError("a stamp is made of the finished answer; ask with stream=false")
        return self

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is allowed only with logprobs=true")
        return self

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        formed = self.response_format is not None and self.response_format.type != "text"
        if sum([formed, self.structured_outputs is not None, bool(self.callable_tools)]) > 1:
            raise ValueError(
                "only one of response_format, structured_outputs and tools can bind an answer"
            )
        if isinstance(self.tool_choice, NamedTool) and not self.callable_tools:
            raise ValueError(
                f"tool_choice names '{self.tool_choice.function.name}', which is not among the tools"
            )
        if self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice is 'required' but there are no tools")
        return self

    @property
    def callable_tools(self) -> list[ToolFunction]:
        """The tools that the answer may call."""
        if not self.tools or self.tool_choice == "none":
            return []
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        return [tool.function for tool in self.tools if named in (None, tool.function.name)]

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionBody(Generation):
    """POST /v1/completions. A prompt may be text or token ids, alone or as a list of several prompts."""

    prompt: str | list[Whole] | list[str] | list[list[Whole]]
    max_tokens: Annotated[int, Field(ge=0), WHOLE] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    echo: bool | None = False
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1), WHOLE] | None = None

    @model_validator(mode="after")
    def _refuse_what_we_cannot(self) -> Self:
        if self.suffix:
            raise ValueError("suffix: this model cannot fill in the middle; leave it out")
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError("best_of must equal n: ask for n choices and pick one yourself")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class TokenizeBody(Body):
    """POST /tokenize, as vLLM has it: a prompt, or a chat to be rendered first."""

    model_config = ConfigDict(json_schema_extra=_exactly_one(prompt="string", messages="array"))

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Whole]


class WeightsBody(Body):
    """POST /admin/weights. Without a folder the run's own model is read again."""

    folder: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
