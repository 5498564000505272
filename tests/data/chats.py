"""Chat templates in the field's styles, written for `tiny_tokenizer`, and conversations for them."""

from __future__ import annotations

from strop.data.records import Message, Record

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The marks leave the stop token out, as many published templates do.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Marks that hold the stop token and the line end behind it.
MARKED_WIDE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# BOS again before each question, spaces around the answer, the system text inside the first question.
LLAMA2 = (
    "{% set ns = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{% set ns.system = '<<SYS>>\n' + message.content + '\n<</SYS>>\n\n' %}"
    "{% elif message.role == 'user' %}{{ bos_token + '[INST] ' + ns.system + message.content + ' [/INST]' }}"
    "{% set ns.system = '' %}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only system, user and assistant are supported') }}{% endif %}"
    "{% endfor %}"
)

# One BOS in front; each turn between header tokens, content trimmed.
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '<|im_end|>\n\n' + message.content | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>\n\n' }}{% endif %}"
)

# Trims, renames the assistant, insists on alternation and refuses a system turn.
TRIMMING = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{ '<|im_start|>' + role + '\n' + message.content | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)

# Writes an empty reasoning block into the last answer only, and drops reasoning from earlier ones.
THINKING = (
    "{% for message in messages %}{% set content = message.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}"
    "{% if '</think>' in message.content %}{{ message.content }}{% else %}{{ '<think>\n\n</think>\n\n' + content }}"
    "{% endif %}{% elif message.role == 'assistant' %}{{ content }}{% else %}{{ message.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Says in front how many turns there are, so that nothing is a prefix of anything.
COUNTING = "{{ messages | length }}{{ '\n' }}" + CHATML

# Nothing closes an answer.
STOPLESS = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

# Templates that only append, so that every conversation can be trained in one go.
APPENDING = {
    "chatml": CHATML,
    "marked": MARKED,
    "marked-wide": MARKED_WIDE,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "trimming": TRIMMING,
    "thinking": THINKING,
    "built-in-chatml": "chatml",
    "built-in-plain": "plain",
}


def conversation(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    """User and assistant in turn, beginning with the user."""
    turns = [Message("assistant" if place % 2 else "user", text) for place, text in enumerate(contents)]
    return (Message("system", system), *turns) if system else tuple(turns)


def record(*contents: str, system: str | None = None, row: int = 1) -> Record:
    return Record("chats.jsonl", row, messages=conversation(*contents, system=system))
