"""What does a template rendered in a process of its own cost? `python -m benchmarks.templates --conversations 10000`

Conversations of the bundled task (a request, an answer) are rendered by the worker of `strop.data.rendering` and,
beside it, by the same sandbox in this process, with two templates: chatml, and one in the manner of Llama 3 (dates,
branches for tools, a header a turn). Both give the same texts, which is checked. The two take turns; the table gives
the median of a pass and its spread (quartiles), and the median of the paired ratio. "With tokens" is the whole of what
a run does with a conversation, tokenizing included, so that the worker's share of it can be seen; it is timed once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from typing import Any

from transformers import AutoTokenizer

from strop.data import rendering
from strop.data.built_in import built_in_template
from strop.data.records import Message, Record
from strop.data.sandbox import compiled
from strop.data.templates import Sample, render_all
from strop.demo import task
from strop.models.sources import find_folder

LLAMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}\
{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
{%- if message.role == 'tool' or message.role == 'ipython' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message.content | string) + '<|eot_id|>' }}
{%- elif message.tool_calls %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' + (message.tool_calls | tojson) + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""


def here(source: str, variables: dict[str, Any], jobs: list[rendering.Job]) -> list[str]:
    """The worker's work in this process: the whole, then each part."""
    template, texts = compiled(source), []
    for job in jobs:
        values = {**variables, **job.variables}
        texts.append(template.render(job.turns, {**values, "add_generation_prompt": job.prompt}).text)
        for turns, prompt in job.parts:
            template.render(job.turns[:turns], {**values, "add_generation_prompt": prompt})
    return texts


def there(source: str, variables: dict[str, Any], jobs: list[rendering.Job]) -> list[str]:
    views = rendering.render_jobs(source, variables, jobs)
    return [view.text if isinstance(view, rendering.View) else "" for view in views]


def timed(work: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--conversations", type=int, default=10_000)
    options.add_argument("--pairs", type=int, default=7)
    asked = options.parse_args()
    rows = task.generate(rows={**dict.fromkeys(task.ROWS, 1), "train": asked.conversations})["train"]
    tokenizer = AutoTokenizer.from_pretrained(str(find_folder("demo")), trust_remote_code=False)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]},
        replace_extra_special_tokens=False,
    )
    turns = [[{"role": m["role"], "content": m["content"]} for m in row["messages"]] for row in rows]
    jobs = [rendering.Job(one, parts=((len(one) - 1, True),)) for one in turns]
    records = [Record("rows", row, tuple(Message(**turn) for turn in one)) for row, one in enumerate(turns)]
    variables = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "tools": None}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jinja2", "transformers"))
    print(f"{len(jobs):,} conversations, {asked.pairs} pairs, {versions}\n")
    print("| template | here, s (quartiles) | worker, s (quartiles) | worker / here (quartiles) | with tokens, s |")
    print("|---|---|---|---|---|")
    for name, source in (("chatml", built_in_template(tokenizer, "chatml")), ("llama 3", LLAMA3)):
        assert here(source, variables, jobs[:200]) == there(source, variables, jobs[:200]), name
        pairs = [
            (timed(here, source, variables, jobs), timed(there, source, variables, jobs)) for _ in range(asked.pairs)
        ]
        tokenizer.chat_template = source
        assert all(isinstance(one, Sample) for one in render_all(records[:50], tokenizer))
        whole = timed(render_all, records, tokenizer)
        ratios = [worker / own for own, worker in pairs]
        own, worker = ([pair[place] for pair in pairs] for place in (0, 1))
        print(f"| {name} | {_spread(own)} | {_spread(worker)} | {_spread(ratios)} | {whole:.2f} |")


def _spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
