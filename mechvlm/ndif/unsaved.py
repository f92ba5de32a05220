"""Names that a trace's block bound and did not save: what uses them afterwards is told so.

nnsight runs a block apart from the code around it, and hands back what was saved. Python alone
would say "cannot access local variable 'a'", and nothing of saving.
"""

import ast
import builtins
from types import FrameType

from nnsight.tracing.util import push

SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
OPERATORS = (
    "abs", "add", "and", "array", "bool", "call", "complex", "contains", "delitem", "divmod", "enter", "eq", "exit", "float",
    "floordiv", "ge", "getitem", "gt", "iadd", "imatmul", "imul", "index", "int", "invert", "ior", "isub", "iter", "itruediv",
    "le", "len", "lshift", "lt", "matmul", "mod", "mul", "ne", "neg", "next", "or", "pos", "pow", "radd", "rand", "rfloordiv",
    "rlshift", "rmatmul", "rmod", "rmul", "ror", "round", "rpow", "rrshift", "rshift", "rsub", "rtruediv", "rxor", "setitem",
    "sub", "truediv", "xor",
)  # fmt: skip


class Unsaved:
    """Stands where the value would be; printing shows what is wrong, any other use raises it."""

    def __init__(self, name: str):
        self.__dict__["_name"] = name

    def __repr__(self) -> str:
        name = self._name
        return (
            f"{name!r} has no value: of what a trace's block reads, only what it saves is kept. Write {name} = "
            "nnsight.save(...) in the block."
        )

    def __getattr__(self, name: str):
        if name.startswith("__"):  # what Python itself looks up, to copy or to show
            raise AttributeError(name)
        raise NameError(repr(self))

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        values = [*args, *(kwargs or {}).values()]
        several = [part for value in values if isinstance(value, list | tuple) for part in value]
        raise NameError(repr(next(value for value in (*values, *several) if isinstance(value, cls))))


def _refuse(self, *_, **__):
    raise NameError(repr(self))


for _operator in OPERATORS:
    setattr(Unsaved, f"__{_operator}__", _refuse)


def names_bound(block: list[ast.stmt]) -> set[str]:
    """The names that statements assign in their own scope."""
    names: set[str] = set()
    waiting: list[ast.AST] = list(block)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        if not isinstance(node, SCOPES + COMPREHENSIONS):
            waiting += ast.iter_child_nodes(node)
    return names


def mark_unsaved(frame: FrameType, node: ast.With | ast.AsyncWith) -> None:
    """Bind an `Unsaved` to each name that the block of `node` bound and the frame does not have."""
    before = frame.f_locals
    lacking = [name for name in names_bound(node.body) if name not in before and not hasattr(builtins, name)]
    if lacking:
        push(frame, {name: Unsaved(name) for name in lacking})
