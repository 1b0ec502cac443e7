"""Conversations: OpenAI messages, ShareGPT turns and transcripts -> checked message lists; tools and tool calls."""

from __future__ import annotations

import re
from typing import Any

from ftx import RowError
from ftx_formats_fields import Note, as_text, kind, parse_json

MessageList = list[dict[str, Any]]

#: ShareGPT's tags -> roles, as in LLaMA-Factory's data/README.md; `function` marks a turn that is a tool call.
TAGS = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "function", "system": "system", "tool": "tool"}
#: Names for the same roles in the OpenAI format, now and formerly.
ALIASES = {"developer": "system", "function": "tool"}
#: Role -> what may stand before it (None: nothing).
FOLLOWS: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
ARTICLE = {"assistant": "an assistant"}


def either_messages(value: Any, name: str) -> MessageList:
    """One message or a list of them, in the OpenAI format or in ShareGPT's with its usual tags: told apart by the keys."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and value and isinstance(value[0], dict) and "from" in value[0]:
        return sharegpt_messages(value, name)
    return openai_messages(value, name)


def openai_messages(value: Any, name: str) -> MessageList:
    """OpenAI messages as chat templates want them: text content, tool calls with their arguments as objects.

    Other keys (`name`, `tool_call_id`, `reasoning_content`, ...) stay. The former `function_call` key and `function`
    role become a tool call and `tool`. RowError for an unknown role, content that is not text, and weight 0, which
    would exempt a turn from the loss.
    """
    messages = []
    for where, turn in _turns(value, name):
        role = turn.get("role")
        role = ALIASES.get(role, role) if isinstance(role, str) else None
        if role not in FOLLOWS:
            raise RowError(f"{where}: unknown role {shown(turn.get('role'))}; known: {', '.join(FOLLOWS)}")
        message = {key: one for key, one in turn.items() if key not in ("role", "content", "tool_calls", "function_call", "weight") and one is not None}
        calls = _calls(turn, where)
        content = _content(turn.get("content"), where, role, may_be_empty=bool(calls))
        messages.append({"role": role, "content": content, **message, **({"tool_calls": calls} if calls else {})})
    return messages


def sharegpt_messages(value: Any, name: str, role_tag: str = "from", content_tag: str = "value", tags: dict[str, str] = TAGS) -> MessageList:
    """ShareGPT turns -> OpenAI messages; a `function` turn (JSON: one call, or a list of them) becomes `tool_calls`."""
    messages: MessageList = []
    for where, turn in _turns(value, name):
        tag = turn.get(role_tag)
        if not isinstance(tag, str) or tag not in tags:
            raise RowError(f"{where}: unknown role tag {shown(tag)} under '{role_tag}'; known: {', '.join(tags)}")
        role = tags[tag]
        if role == "function":
            called = parse_json(as_text(turn.get(content_tag), f"{where} ({tag})"), f"{where} ({tag})")
            calls = [_call(call, f"{where} ({tag})") for call in (called if isinstance(called, list) else [called])]
            if not calls:
                raise RowError(f"{where} ({tag}) calls nothing")
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            messages.append({"role": role, "content": _content(turn.get(content_tag), where, role)})
    return messages


def transcript_messages(value: str, name: str) -> MessageList:
    """A transcript as in Anthropic's hh-rlhf, `\\n\\nHuman: ...\\n\\nAssistant: ...` -> messages."""
    lead, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", value)
    if lead.strip() or not parts:
        raise RowError(f"field '{name}' is no transcript: it does not begin with 'Human:'")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return openai_messages([{"role": "user" if who == "Human" else "assistant", "content": said.strip()} for who, said in turns], name)


def with_system(messages: MessageList, system: str) -> MessageList:
    """The conversation under a system text that stands in a column of its own ("": none)."""
    if not system:
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] == system:
            return messages
        raise RowError("the row has two different system texts: in the system column and in the conversation")
    return [{"role": "system", "content": system}, *messages]


def check_conversation(messages: MessageList, where: str, hint: str = "") -> MessageList:
    """The conversation itself; RowError if its roles are out of order or it does not end with an answer.

    `where` begins the error texts ("field 'messages'"); `hint` ends those about turns that could be dropped at the start or at the end.
    """
    before = None
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if before not in FOLLOWS[role]:
            if before in (None, "system") and role in ("assistant", "tool"):
                raise RowError(f"{where} begins with {_a(role)} turn{hint}")
            place = "must stand first" if role == "system" else f"cannot follow {_a(before or role)} turn"
            raise RowError(f"{where}, message {number}: {_a(role)} turn {place}")
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError(f"{where} has no assistant turn")
    if before != "assistant":
        raise RowError(f"{where} ends with {_a(str(before))} turn that no answer follows{hint}")
    return messages


def trimmed(messages: MessageList, note: Note) -> MessageList:
    """Without the turns before the first user turn (a system text stays) and those after the last answer; notes what went."""
    roles = [message["role"] for message in messages]
    lead = 1 if roles[:1] == ["system"] else 0
    first = roles.index("user") if "user" in roles else lead
    last = max((i for i, role in enumerate(roles) if role == "assistant"), default=len(roles) - 1)
    if first > lead:
        note(f"dropped {first - lead} turn(s) before the first user turn")
    if last < len(roles) - 1:
        note(f"dropped {len(roles) - 1 - last} turn(s) after the last answer")
    return messages[:lead] + messages[max(first, lead) : last + 1]


def tools_of(value: Any, name: str) -> list[dict[str, Any]]:
    """The tools of a row as chat templates want them (`{"type": "function", "function": {...}}`); [] for none.

    `value` is a list, or its JSON text (as in glaive); a bare `{"name", "description", "parameters"}` is wrapped.
    """
    where = f"field '{name}'"
    if isinstance(value, str):
        value = parse_json(value, where) if value.strip() else None
    if value is None:
        return []
    tools = []
    for number, tool in enumerate(value if isinstance(value, list) else [value], start=1):
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise RowError(f"{where}, tool {number}: a tool must be an object with a name")
        tools.append(tool if "function" in tool else {"type": "function", "function": inner})
    return tools


def shown(value: Any) -> str:
    """A value for an error text: short texts and numbers as they are, anything else by its kind."""
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:40] + "...")
    return str(value) if isinstance(value, float) or type(value) is int else kind(value)


def _turns(value: Any, name: str) -> list[tuple[str, dict[str, Any]]]:
    if value is None:
        raise RowError(f"field '{name}' is missing or null")
    if not isinstance(value, list):
        raise RowError(f"field '{name}' must be a list of messages, this is {kind(value)}")
    if not value:
        raise RowError(f"field '{name}' is empty")
    turns = []
    for number, turn in enumerate(value, start=1):
        where = f"field '{name}', message {number}"
        if not isinstance(turn, dict):
            raise RowError(f"{where} must be an object, this is {kind(turn)}")
        if turn.get("weight") not in (None, 1):
            raise RowError(f"{where} has weight {shown(turn['weight'])}: turns cannot be weighted, every answer counts in the loss")
        turns.append((where, turn))
    return turns


def _content(value: Any, where: str, role: str, *, may_be_empty: bool = False) -> str:
    """A message's text. Parts are joined; only a system or tool turn, or an answer that is a tool call, may be empty."""
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                what = f"of type {shown(part.get('type'))}" if isinstance(part, dict) else f"that is {kind(part)}"
                raise RowError(f"{where} ({role}) has a part {what}: only text can be trained on")
        value = "".join(part["text"] for part in value)
    if may_be_empty and value is None:
        return ""
    if isinstance(value, str) and (may_be_empty or role in ("system", "tool")):
        return value
    return as_text(value, f"{where} ({role})")


def _calls(turn: dict[str, Any], where: str) -> list[dict[str, Any]]:
    calls = turn.get("tool_calls")
    if calls is None and turn.get("function_call") is not None:
        calls = [turn["function_call"]]
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise RowError(f"{where}: tool_calls must be a list, this is {kind(calls)}")
    if calls and turn.get("role") != "assistant":
        raise RowError(f"{where}: only an assistant turn can call tools")
    return [_call(call, f"{where}, tool call") for call in calls]


def _call(call: Any, where: str) -> dict[str, Any]:
    """One call, bare or in the OpenAI form, with its arguments as an object (text is parsed; none is {})."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise RowError(f"{where} must be an object with a name and arguments")
    arguments = inner.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = parse_json(arguments, f"{where}: arguments")
    if arguments in (None, "") or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowError(f"{where}: arguments must be an object, this is {kind(arguments)}")
    rest = {key: value for key, value in call.items() if key not in ("type", "function")} if "function" in call else {}
    return {**rest, "type": "function", "function": {"name": inner["name"], "arguments": arguments}}


def _a(role: str) -> str:
    return ARTICLE.get(role, f"a {role}")
