"""Whether a module's forward is so plain that one symbolic trace tells all it will ever do: read from its source.

A trace shows one way through a forward, and runs it. So nothing is traced that could go another way next time (by an
argument, a flag, grad mode) or do more than return a value: what is allowed here can do neither.
"""

import ast
import inspect
import textwrap
from types import CodeType, FunctionType

from torch import Tensor, nn

_NAMES = {
    ast.If: "a branch",
    ast.IfExp: "a conditional expression",
    ast.BoolOp: "a conditional expression",
    ast.For: "a loop",
    ast.While: "a loop",
    ast.With: "a with block",
    ast.Try: "a try block",
    ast.Expr: "a statement that only calls something",
    ast.AugAssign: "an assignment in place",
}
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.MatMult, ast.Pow, ast.USub, ast.Load)
_PLAIN = (ast.BinOp, ast.UnaryOp, ast.Constant, ast.Tuple, ast.Slice, ast.Subscript, ast.keyword, *_OPERATORS)
_CONSTANTS = (bool, int, float, str, type(None))


def _named(node: ast.AST) -> str:
    return f"{_NAMES.get(type(node), f'something not known to be harmless ({type(node).__name__})')}, "


def _readable(parent: nn.Module, name: str) -> bool:
    """Whether `self.name` is a number, a Parameter or a buffer, not computed by a property of the class."""
    if hasattr(type(parent), name):
        return False
    if name in vars(parent):
        return type(vars(parent)[name]) in _CONSTANTS
    return type(parent._parameters.get(name, parent._buffers.get(name))) in (nn.Parameter, Tensor)


class _Expressions(ast.NodeVisitor):
    """Finds what an expression has besides arithmetic, indexing and calls of the parent's children."""

    def __init__(self, parent: nn.Module, self_name: str, arguments: set[str]):
        self.parent, self.self_name, self.local = parent, self_name, arguments
        self.found: str | None = None

    def doubt(self, what: str) -> None:
        self.found = self.found or what

    def attribute(self, node: ast.AST) -> str | None:
        """x of `self.x`."""
        of_self = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        return node.attr if of_self and node.value.id == self.self_name else None

    def visit_Call(self, node: ast.Call) -> None:
        child = self.attribute(node.func)
        own = child in vars(self.parent) or hasattr(type(self.parent), child or "")
        if child not in self.parent._modules or own:
            self.doubt(f"a call of `{ast.unparse(node.func)}`, which is no module of the parent's, ")
        for part in (*node.args, *node.keywords):
            self.visit(part)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self.attribute(node)
        if name is None or not _readable(self.parent, name):
            self.doubt(f"a use of `{ast.unparse(node)}`, ")

    def visit_Name(self, node: ast.Name) -> None:
        if node.id not in self.local:
            self.doubt(f"a use of `{node.id}`, ")

    def generic_visit(self, node: ast.AST) -> None:
        if not isinstance(node, _PLAIN):
            self.doubt(_named(node))
        super().generic_visit(node)


def _targets(target: ast.AST) -> list[str] | None:
    """Names of local variables that are assigned to; None: to something else too."""
    names = target.elts if isinstance(target, ast.Tuple) else [target]
    return [name.id for name in names] if all(isinstance(name, ast.Name) for name in names) else None


def _doubt(statements: list[ast.stmt], expressions: _Expressions) -> str | None:
    for statement in statements:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names = [_targets(target) for target in targets]
            if None in names or statement.value is None:
                return "an assignment to more than a local variable, "
            expressions.visit(statement.value)
            expressions.local = expressions.local.union(*names)
            if expressions.self_name in expressions.local:
                return f"an assignment to `{expressions.self_name}`, "
        elif isinstance(statement, ast.Return) and statement.value is not None:
            expressions.visit(statement.value)
        else:
            return _named(statement)
        if expressions.found is not None:
            return expressions.found
    return None


def _same_code(definition: ast.FunctionDef, function: FunctionType) -> bool:
    """Whether a definition without doubts is that of what runs: its file may have changed since."""
    constants = compile(ast.Module([definition], []), "<source>", "exec", dont_inherit=True).co_consts
    code = next(c for c in constants if isinstance(c, CodeType) and c.co_name == definition.name)
    parts = ("co_code", "co_names", "co_varnames", "co_freevars")
    return all(getattr(code, part) == getattr(function.__code__, part) for part in parts)


def _definition(function: FunctionType) -> ast.FunctionDef | None:
    """The function's definition, None where its source is not at hand."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    found = tree.body[0]
    plain = len(tree.body) == 1 and isinstance(found, ast.FunctionDef) and not found.decorator_list
    if not plain:
        return None
    for argument in found.args.args:
        argument.annotation = None  # evaluated where it was defined, not here
    found.returns = None
    return found


def not_plain(parent: nn.Module) -> str | None:
    """Why the parent's forward may do more than a trace shows, in words that follow "its parent's"; None: it cannot."""
    cls = type(parent)
    called = (cls.__call__, cls.__getattr__, cls.__getattribute__)
    if called != (nn.Module.__call__, nn.Module.__getattr__, object.__getattribute__):
        return "class changes how it is called or how its attributes are read"
    if cls.forward is nn.Sequential.forward and cls.__iter__ is nn.Sequential.__iter__:
        return None
    forward = cls.forward
    wrapped = not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__")
    definition = None if wrapped else _definition(forward)
    no_source = "forward is wrapped, or its source is not at hand"
    if definition is None:
        return no_source
    names = [argument.arg for argument in (*definition.args.posonlyargs, *definition.args.args)]
    if len(names) < 2:
        return "forward names no argument of its own"
    body = definition.body[1:] if ast.get_docstring(definition) is not None else definition.body
    doubt = _doubt(body, _Expressions(parent, names[0], set(names[1:])))
    if doubt is not None:
        return f"forward has {doubt}so that a trace might not tell all it does"
    return None if _same_code(definition, forward) else no_source
