"""Solve: lines as in the training data, roots that hold, and what cannot be solved."""

from __future__ import annotations

import pytest
import sympy

from moss_jt.errors import ToolError
from moss_jt.tools.equations import solve

SOLVED = {
    "x+y=35;2x+4y=94": "x = 23\ny = 12",
    "x+y=15, 2x+4y=34": "x = 13\ny = 2",
    "x+y=15，2x+4y=34": "x = 13\ny = 2",
    "x+y=15；2x+4y=34;": "x = 13\ny = 2",
    "x/4=(120-x)/5": "x = 160/3",
    "12x = 3*21x": "x = 0",
    "(x + 5)^2 = 169": "x_0 = -18\nx_1 = 8",
    "x^2=15": "x_0 = -sqrt(15)\nx_1 = sqrt(15)",
    "x²=16": "x_0 = -4\nx_1 = 4",
    "x^2+4=0": "x_0 = -2*I\nx_1 = 2*I",
    "(4/3)x - x = 64": "x = 192.000000000000",
    "x+14=(37-x)*0.25": "x = -3.80000000000000",
    "x+2x=180/1": "x = 60.0000000000000",
    "60=x+x/5": "x = 50",
    "24a+24b+24c=1;9b+9c=1;18a+18c=1": "a = -5/72\nb = -1/72\nc = 1/8",
    "y=(5/4)*(x-y);y-40=(1/10)*(x-y+40)": "x = 86.0869565217391\ny = 47.8260869565217",
    "24*pi = 2*pi*r": "r = 12.0000000000000",
    "5*(x^2)*sqrt(5)/4=25": "x_0 = -2.99069756244244\nx_1 = 2.99069756244244",
    "2t + 6t + t = 1, t": "t = 1/9",
    "a*x=b; x": "x = b/a",
    "6*a^2=216;a^3": "a_0 = -6\na_1 = 6",
    "x^2-5x+6": "x_0 = 2\nx_1 = 3",
    "(x-1)(x-2)=0": "x_0 = 1\nx_1 = 2",
    "2(x+1)=8": "x = 3",
    "x(x-3)=0": "x_0 = 0\nx_1 = 3",
    "x+y=7;xy=12": "x_0 = 3\ny_0 = 4\nx_1 = 4\ny_1 = 3",
    "total_cost = 62 + 9*3": "total_cost = 89",
    "人数*3=36": "人数 = 12",
    "|x-2|=3": "x_0 = -1\nx_1 = 5",
    "sqrt(x)=3": "x = 9",
    "2^x=8": "x = 3",
    "ln(x)=0": "x = 1",
    "x==5": "x = 5",
    "3! * x = 12": "x = 2",
    "E=6.63e-34*3e8/500e-9": "E = 3.97800000000000e-19",  # small is not nothing
    "x*1e20=1e-10": "x = 1.00000000000000e-30",
    "x^2-1e-40=0": "x_0 = -1.00000000000000e-20\nx_1 = 1.00000000000000e-20",
    "x*0.5+sqrt(2)+sqrt(3)=sqrt(5+2sqrt(6))": "x = 0",
    "x^3-3x+1=0": "x_0 = 0.347296355333861\nx_1 = 1.53208888623796\nx_2 = -1.87938524157182",  # no 0.e-20*I
    "x+y=35;2x+4y=94;x": "x = 23",  # an unknown is named beside several equations
    "x+y=35,2x+4y=94,y": "y = 12",
    "2x+y=10;y=4;x": "x = 3",
    "v=10;t=5;s=v*t;s": "s = 50",
    "x^2=4;y=x^2;y": "y = 4",
    "x+y=35;2x+4y=94;a=b;x": "x = 23",
    "a*x=b;c*y=x;y": "y = x/c",
    "2x=1,000": "x = 500",  # a comma within a number
    "2(x+1)=1，000，000": "x = 499999",
    "x+y=1,000,x-y=200": "x = 600\ny = 400",
    "x=1,y=2": "x = 1\ny = 2",
    "x=1, 200=y": "x = 1\ny = 200",
    "x=1,200=y": "x = 1\ny = 200",
    "sin(30°)*x=5": "x = 10.0000000000000",  # units
    "sin(x+30°)=1": "x = pi/3",
    "x=10*sin(20°)": "x = 3.42020143325669",
    "x+30°=180°": "x = 150",
    "x+3万=50000": "x = 20000",
    "x+5个*3元=100元": "x = 85",
    "3小时*60千米+x=300千米": "x = 120",
    "12个苹果+x=20个": "x = 8",
    "x+5元=10块": "x = 5",
    "80分+85分+x=90*3门": "x = 105",
    "x=2亿/5万": "x = 4000.00000000000",
    "5x=10元": "x = 2",
    "x/2小时=50公里": "x = 100",
    "cbrt(-2)*x=1": "x = -0.793700525984100",
}


@pytest.mark.parametrize("equations", SOLVED)
def test_solved_in_the_words_of_the_data(equations: str) -> None:
    assert solve(equations) == SOLVED[equations]


UNSOLVED = {
    "": "there are 0 equations",
    "l*w=72": "more unknowns than equations",
    "4x + 10 = y;6x = z": "more unknowns",
    "x=x": "nothing depends on an unknown",
    "1=2": "nothing depends on an unknown",
    "x=x+1": "nothing depends|no solution",
    "x+y=1;x+y=2": "no solution",
    "x": "there is no equation",
    "x!=6": "factorial of an unknown",
    "x//2=3": "// of an unknown",
    "f(x,2)=3": "2 arguments",
    "foo(x)=3": "no function 'foo'",
    "x^1000=2": "a power above",
    "x/0=1": "division by zero",
    "x=12,34": "34 stands alone beside an equation",
    "x=5;-3": "-3 stands alone beside an equation",
    "x+3米=5厘米": "厘米 and 米 stand in one sum",
    "-500克+x=2千克": "克 and 千克 stand in one sum",
    "det(randMatrix(5,7))": "no function",
    ";".join(f"x{n}=1" for n in range(20)): "there are 20 equations",
}


@pytest.mark.parametrize("equations", UNSOLVED)
def test_unsolved_with_a_reason(equations: str) -> None:
    with pytest.raises(ToolError, match=UNSOLVED[equations]):
        solve(equations)


@pytest.mark.parametrize("equation", ["x^3-3x+1=0", "x^5-x-1=0", "x^3+x=1", "x^4-10x^2+1=0", "cos(x)=0.5", "x^2+x+1=0"])
def test_every_root_holds(equation: str) -> None:
    """Put back into the equation, by SymPy's own reader of text."""
    left, _, right = equation.replace("^", "**").replace("3x", "3*x").replace("10x", "10*x").partition("=")
    difference = sympy.sympify(f"({left}) - ({right})")
    roots = [line.split(" = ")[1] for line in solve(equation).split("\n")]
    assert roots
    for root in roots:
        assert abs(sympy.N(difference.subs(sympy.Symbol("x"), sympy.sympify(root)), 20)) < 1e-12
