"""The process that chat templates run in: reads jobs from standard input, writes one answer a line.

Started by `rendering.py` as `python -m strop.data.sandbox_worker`. It imports nothing but Jinja and the sandbox, gets
no environment variables but a few, and limits itself before it reads the first template: memory, processor time for
each job, and no files to be written. Those limits come from the operating system (Linux, macOS); where it has none of
them (Windows), the sandbox's own counters and the parent's deadline remain.

Both sides speak JSON, one object a line. A request is `{source, variables, jobs}`; for each job one answer follows:
`{"text", "marks", "parts"}`, or `{"error", "kind"}` with the kind `syntax`, `limit` or `refused`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jinja2

from strop.data.sandbox import ChatTemplate, TemplateLimitError, compiled


def _processor_limit(memory_bytes: int) -> Callable[[int], None]:
    """Set the limits of the process, and give what renews the one on processor time for the next job."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return lambda seconds: None
    for kind, most in ((resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, memory_bytes)):
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # macOS refuses a limit on memory that is below what is mapped already
            continue
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]

    def renew(seconds: int) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))

    return renew


def _part(template: ChatTemplate, job: Mapping[str, Any], whole: str, end: int, asks: bool) -> int | str | None:  # noqa: FBT001  as it stands in a job
    """The length of the first `end` turns as text, if the whole begins with it; None if not; what a refusal says."""
    try:
        values = {**job["variables"], "add_generation_prompt": asks}
        text = template.render(job["turns"][:end], values).text
    except TemplateLimitError:
        raise
    except jinja2.TemplateError as error:
        return str(error)
    return len(text) if whole.startswith(text) else None


def answer(source: str, variables: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """Do one job: render its turns, and say of each of its parts how long that is.

    Args:
        source: The template.
        variables: What it sees beside the turns.
        job: `turns`, `prompt` (whether the whole ends with the header of an answer), `variables` of its own, and
            `parts`: pairs of a number of turns and whether the header of an answer follows them.
    """
    job = {**job, "variables": {**variables, **job["variables"]}}
    try:
        template = compiled(source)
        values = {**job["variables"], "add_generation_prompt": job["prompt"]}
        whole = template.render(job["turns"], values)
        parts = [_part(template, job, whole.text, end, asks) for end, asks in job["parts"]]
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: not valid Jinja: {error.message}", "kind": "syntax"}
    except (TemplateLimitError, RecursionError, MemoryError) as error:
        return {"error": str(error) or type(error).__name__, "kind": "limit"}
    except jinja2.TemplateError as error:
        return {"error": str(error), "kind": "refused"}
    return {"text": whole.text, "marks": whole.marks, "parts": parts}


def compile_answer(source: str) -> dict[str, Any]:
    """Compile a template; `{}` if it can be."""
    try:
        compiled(source)
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: not valid Jinja: {error.message}", "kind": "syntax"}
    except (jinja2.TemplateError, RecursionError, MemoryError, OverflowError, SyntaxError) as error:
        return {"error": str(error) or type(error).__name__, "kind": "limit"}
    return {}


def main(memory_bytes: int, processor_seconds: int) -> None:
    """Answer until standard input ends."""
    renew = _processor_limit(memory_bytes)
    for line in sys.stdin:
        request = json.loads(line)
        renew(processor_seconds)
        if request["jobs"] is None:
            print_line(compile_answer(request["source"]))
        else:
            for job in request["jobs"]:
                renew(processor_seconds)
                print_line(answer(request["source"], request["variables"], job))


def print_line(value: Mapping[str, Any]) -> None:
    """Write one answer."""
    sys.stdout.write(json.dumps(value))
    sys.stdout.write("\n")
    sys.stdout.flush()  # one at a time, so that the parent knows which job a killed worker was at


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
