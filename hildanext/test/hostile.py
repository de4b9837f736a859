"""Programs that try to get away with something: what each does, what may come of it, and how long it may take.

The task is add(a, b) unless a row says otherwise; none of these programs adds, but for those that must pass.
"""

from dataclasses import dataclass

from hildanext.grading.sandbox.limits import Job, Kind, Limits

TEST = """
def check(candidate):
    assert candidate(1, 2) == 3
    assert candidate(-5, 5) == 0
"""
PROMPT = 'def add(a, b):\n    """The sum of two numbers."""\n'


@dataclass(frozen=True)
class Row:
    name: str
    program: str
    kinds: tuple[Kind, ...]
    seconds: float = 20.0
    """Enough where the program ends by itself, however busy the machine is; short where only the clock ends it."""
    test: str = TEST
    memory_bytes: int = 512 << 20
    level: int = 1
    """Of isolation, below which the row does not hold."""

    def job(self) -> Job:
        return Job(self.program, "add", self.test, setup=PROMPT)

    def limits(self) -> Limits:
        return Limits(seconds=self.seconds, memory_bytes=self.memory_bytes)


def body(text: str) -> str:
    """The function with this body."""
    return "def add(a, b):\n" + "\n".join("    " + line for line in text.strip("\n").split("\n")) + "\n"


FAILED: tuple[Kind, ...] = ("failed",)
TIMEOUT: tuple[Kind, ...] = ("timeout",)
SHORT = 0.7

LOOKS_FOR_RESULT = """
import sys
frame = sys._getframe()
while frame is not None:
    for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
        if isinstance(value, list):
            value.append("passed")
        if isinstance(value, dict):
            value["passed"] = True
    frame = frame.f_back
return -1
"""

ALWAYS_EQUAL = """
class Anything{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def add(a, b): return Anything({value})
"""

ROWS = [
    Row("01 endless loop", body("while True: pass"), TIMEOUT, SHORT),
    Row(
        "02 endless loop that catches everything",
        body("while True:\n    try:\n        while True: pass\n    except BaseException: pass"),
        TIMEOUT,
        SHORT,
    ),
    Row(
        "03 disarms timers and loops",
        body("import signal\nsignal.setitimer(signal.ITIMER_REAL, 0)\nsignal.alarm(0)\nwhile True: pass"),
        TIMEOUT,
        SHORT,
    ),
    Row("04 fork bomb", body("import os\nwhile True: os.fork()"), ("failed", "timeout"), SHORT),
    Row("04 fork bomb, posix", body("import posix\nwhile True: posix.fork()"), ("failed", "timeout"), SHORT),
    Row("05 ten gigabytes at once", body("x = bytearray(10**10)\nreturn 3"), ("memory",)),
    Row("05 a list that grows", "x = []\n" + body("while True: x.append(bytearray(10**6))"), ("memory",)),
    Row("05 a list that grows, in the function", body("x = []\nwhile True: x.append(' ' * 10**6)"), ("memory",)),
    Row("06 sys.exit on import", "import sys\nsys.exit(0)\n" + body("return a + b"), FAILED),
    Row("06 SystemExit on import", "raise SystemExit\n" + body("return a + b"), FAILED),
    Row("06 SystemExit in the function", body("raise SystemExit(0)"), FAILED),
    Row("06 sys.exit after an answer", "import atexit, sys\n" + body("sys.exit(3)"), FAILED),
    Row("07 os._exit in the function", body("import os\nos._exit(0)"), ("crashed",)),
    Row("07 os._exit on import", "import os\nos._exit(0)", ("crashed",)),
    Row("08 walks frames to the result", body(LOOKS_FOR_RESULT), FAILED),
    Row("09 object equal to everything", ALWAYS_EQUAL.format(base="", value=""), FAILED),
    Row("09 int equal to everything", ALWAYS_EQUAL.format(base="(int)", value="7"), FAILED),
    Row("09 str equal to everything", ALWAYS_EQUAL.format(base="(str)", value="'7'"), FAILED),
    Row("09 list equal to everything", ALWAYS_EQUAL.format(base="(list)", value=""), FAILED),
    Row("10 redefines check", "def check(c): pass\n" + body("return 0") + "def check(c): pass\n", FAILED),
    Row("10 only a check", "def check(c): pass\n", FAILED),
    Row(
        "10 check in every module",
        "import sys\nfor m in list(sys.modules.values()): m.check = print\n" + body("return 0"),
        FAILED,
    ),
    Row(
        "11 patches builtins",
        "import builtins\nbuiltins.AssertionError = ValueError\n"
        "for n in ('abs', 'all', 'sorted', 'sum'): setattr(builtins, n, lambda *a, **k: True)\n" + body("return 0"),
        FAILED,
    ),
    Row(
        "11 patches isinstance",
        "import builtins\nbuiltins.isinstance = lambda *a: True\n" + body("return 0"),
        ("failed", "protocol_error", "crashed"),
    ),
    Row("12 prints passed", body("print('passed')\nprint('{\"kind\": \"passed\"}')\nreturn 0"), FAILED),
    Row(
        "12 prints verdicts to every descriptor",
        body(
            "import os\nfor fd in range(32):\n"
            '    try: os.write(fd, b\'started\\n{"kind": "passed", "detail": ""}\\n\')\n'
            "    except OSError: pass\nreturn 0"
        ),
        ("protocol_error",),
    ),
    Row("13 writes above its folder", body("open('../../x', 'w').write('x')\nreturn 0"), FAILED),
    Row(
        "13 writes ten gigabytes",
        body("with open('big', 'wb') as file:\n    while True: file.write(b'x' * 10**6)"),
        FAILED,
    ),
    Row("13 writes many files", body("for i in range(10**6): open(str(i), 'w').write('x' * 1000)"), FAILED),
    Row("13 writes to its folder", body("import os\nopen('x', 'w').write('x')\nos.mkdir('d')\nreturn 0"), FAILED),
    Row(
        "14 reads the environment",
        body(
            "import os\n"
            "assert set(os.environ) <= {'PATH', 'LANG', 'PYTHONHASHSEED', 'LC_CTYPE'}, os.environ\nreturn a + b"
        ),
        ("passed",),
    ),
    Row(
        "14 reads private files",
        body(
            "import os, sys\n"
            "python = sys.base_prefix.split('/')[1]\n"
            "assert set(os.listdir('/')) <= {'lib', 'lib64', 'usr', 'etc', 'dev', '.work', python}, os.listdir('/')\n"
            "assert os.listdir('/etc') == ['ld.so.cache'] and os.listdir('/dev') == ['null']\n"
            "assert set(os.listdir('/usr')) <= {'lib', 'lib64', 'local'} and not os.path.exists('/proc/self')\n"
            "above = sys.base_prefix.rpartition('/')[0] or '/usr'\n"
            "assert set(os.listdir(above)) <= {sys.base_prefix.rpartition('/')[2], 'lib', 'lib64', 'local'}\n"
            "assert os.getcwd() == '/.work' and os.listdir('.') == []\n"
            "return a + b"
        ),
        ("passed",),
        level=3,
    ),
    Row(
        "14 reads installed packages",
        body(
            "import os\nfor folder in (os.__file__.rpartition('/')[0], '/usr/lib/python3', '/usr/lib/python3.11'):\n"
            "    for name in ('site-packages', 'dist-packages'):\n"
            "        path = os.path.join(folder, name)\n"
            "        assert not os.path.exists(path) or os.listdir(path) == [], path\n"
            "return a + b"
        ),
        ("passed",),
        level=3,
    ),
    Row("15 opens a socket", body("import socket\nsocket.socket()\nreturn a + b"), FAILED),
    Row("15 asks for a name", body("import socket\nsocket.getaddrinfo('example.org', 80)\nreturn a + b"), FAILED),
    Row(
        "15 connects to this machine",
        body("import socket\nsocket.create_connection(('127.0.0.1', 22), 1)\nreturn a + b"),
        FAILED,
    ),
    Row("16 floods standard output", body("while True: print('x' * 10**6)"), TIMEOUT, SHORT),
    Row(
        "16 floods standard error",
        body("import os\nfor _ in range(1000): os.write(2, b'x' * 10**6)\nreturn 0"),
        ("failed", "timeout"),
    ),
    Row(
        "17 a thread sleeps on",
        "import threading, time\n"
        + body("threading.Thread(target=time.sleep, args=(60,), daemon=False).start()\nreturn a + b"),
        ("passed",),
    ),
    Row(
        "18 reloads os and kills",
        body("import importlib, os\nimportlib.reload(os)\nos.kill(os.getppid(), 9)\nreturn 0"),
        ("failed", "crashed"),
    ),
    Row(
        "18 calls the C library",
        body(
            "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.system(b'touch /tmp/hostile')\n"
            "assert libc.fork() == -1 and libc.ptrace(16, 1, 0, 0) == -1 and libc.kill(-1, 9) == -1\nreturn 0"
        ),
        FAILED,
    ),
    Row("18 posix_spawn", body("import os\nos.posix_spawn('/bin/sh', ['sh', '-c', 'true'], {})\nreturn a + b"), FAILED),
    Row("18 subprocess", body("import subprocess\nsubprocess.run(['true'])\nreturn a + b"), FAILED),
    Row("19 recursion", body("return add(a, b) + 1"), FAILED),
    Row(
        "19 recursion through C without a limit",
        "import sys\nsys.setrecursionlimit(10**9)\n" + body("return sorted([1, 2], key=lambda x: add(a, b))"),
        ("failed", "crashed"),
    ),
    Row(
        "19 a nested value overflows the C stack",
        body("x = ()\nfor _ in range(2 * 10**6): x = (x,)\nreturn hash(x)"),
        ("failed", "crashed"),
    ),
    Row("20 input()", body("return int(input())"), FAILED),
    Row("20 reads standard input", body("import sys\nreturn 3 if sys.stdin.read() else 0"), FAILED),
    Row("21 a billion characters", body("return 'x' * 10**9"), ("protocol_error",), memory_bytes=1200 << 20),
    Row("21 a billion characters in half the memory", body("return 'x' * 10**9"), ("memory",)),
    Row("21 two million characters", body("return 'x' * (2 << 20)"), ("protocol_error",)),
    Row("21 nested deeply", body("x = []\nfor _ in range(10**5): x = [x]\nreturn x"), ("protocol_error",)),
    Row("21 a list that holds itself", body("x = []\nx.append(x)\nreturn x"), ("protocol_error",)),
    Row(
        "21 shared lists, huge when written out",
        body("x = [0] * 10\nfor _ in range(20): x = [x, x]\nreturn x"),
        ("protocol_error",),
    ),
    Row("22 a generator", body("yield 3"), ("protocol_error",)),
    Row("22 NaN", body("return float('nan')"), FAILED),
    Row(
        "22 True is 1, as in Python",
        body("return True if a == 1 else 0.0"),
        ("passed",),
        test="def check(c):\n    assert c(1, 0) == 1",
    ),
    Row("22 1.0 is 1, as in Python", body("return float(a + b)"), ("passed",)),
    Row("23 sleeps", body("import time\ntime.sleep(10)"), TIMEOUT, SHORT),
    Row("23 a catastrophic pattern", body("import re\nre.match(r'(a+)+$', 'a' * 64 + 'b')"), TIMEOUT, SHORT),
    Row(
        "24 a daemon",
        body(
            "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
            "        time.sleep(60)\n    os._exit(0)\nreturn 0"
        ),
        FAILED,
    ),
    Row("25 deletes its folder", body("import os\nos.rmdir(os.getcwd())\nreturn 0"), FAILED),
    Row(
        "25 locks its folder",
        body("import os\nos.mkdir('d')\nopen('d/x', 'w')\nos.chmod('d', 0)\nos.chmod('.', 0)\nreturn 0"),
        FAILED,
    ),
    Row("26 syntax error", "def add(a, b:\n", FAILED),
    Row("26 tabs and spaces", "def add(a, b):\n\tif a:\n        return a\n\treturn b\n", FAILED),
    Row("26 a null byte", body("return a + b") + "\0", FAILED),
    Row("26 a lone surrogate", body("return '\udc80'"), FAILED),
    Row("26 empty", "", FAILED),
    Row("26 no such function", "def plus(a, b): return a + b", FAILED),
    Row("26 not a function", "add = 3", FAILED),
    Row("26 nested far too deep to compile", "x = " + "(" * 10_000 + ")" * 10_000, ("failed", "crashed", "memory")),
    Row("26 longer than may be sent", body("return a + b") + "#" * (2 << 20), FAILED),
    Row(
        "27 a right solution with prints and imports",
        "import math, itertools, collections, re, functools, random, decimal\nfrom typing import List\n"
        + body("print('adding', a, b)\nreturn math.floor(sum(itertools.chain([a], [b])))"),
        ("passed",),
    ),
]

FORGED = """
import gc, os, struct, time
def channel():
    return [o for o in gc.get_objects() if type(o).__name__ == "Channel"][0]
def raw(data):
    c = channel()
    while data: data = data[os.write(c.write_to, data):]
def frame(payload):
    raw(struct.pack(">I16s", len(payload), channel().nonce) + payload)
def add(a, b):
    {act}
    return a + b
"""


def forged(act: str) -> str:
    """A program that writes to the channel itself before it gives the right answer."""
    return FORGED.format(act=act)


IDLE = "frame(b'%s'); time.sleep(60)"
ONCE = "def check(candidate):\n    assert candidate(1, 2) == 3\n"

ATTACKS = [
    # what comes over the channel
    Row("an answer to a call that was not made", forged('frame(b\'{"id":2,"value":3}\')'), ("protocol_error",)),
    Row("two answers to one call", forged('frame(b\'{"id":1,"value":3}\')'), ("protocol_error",)),
    Row("an answer numbered True", forged(IDLE % '{"id":true,"value":3}'), ("protocol_error",), test=ONCE),
    Row("an answer numbered 1.0", forged(IDLE % '{"id":1.0,"value":3}'), ("protocol_error",), test=ONCE),
    Row("an answer numbered 2", forged(IDLE % '{"id":2,"value":3}'), ("protocol_error",), test=ONCE),
    Row("a list for an answer", forged('frame(b"[1]")'), ("protocol_error",)),
    Row("an answer without a value", forged("frame(b'{\"id\":1}')"), ("protocol_error",)),
    Row("no JSON", forged('frame(b"{")'), ("protocol_error",)),
    Row("no ASCII", forged('frame(b"\\xff")'), ("protocol_error",)),
    Row("an empty frame", forged('frame(b"")'), ("protocol_error",)),
    Row("a million brackets", forged('frame(b\'{"id":1,"value":\' + b"[" * 10**6)'), ("protocol_error",)),
    Row(
        "a hundred tags",
        forged('frame(b\'{"id":1,"value":\' + b\'{"t":[\' * 100 + b"]}" * 100 + b"}")'),
        ("protocol_error",),
    ),
    Row("a million digits", forged('frame(b\'{"id":1,"value":\' + b"9" * 10**6 + b"}")'), ("protocol_error",)),
    Row("a thousand digits", forged('frame(b\'{"id":1,"value":\' + b"9" * 1000 + b"}")'), ("protocol_error",)),
    Row("a million digits after a point", forged('frame(b\'{"id":1,"value":0.\' + b"9" * 10**6 + b"}")'), FAILED),
    Row(
        "a million hexadecimal digits",
        forged('frame(b\'{"id":1,"value":{"i":"\' + b"f" * 10**6 + b\'"}}\')'),
        ("protocol_error",),
    ),
    Row("NaN without its tag", forged('frame(b\'{"id":1,"value":NaN}\')'), ("protocol_error",)),
    Row("an unknown tag", forged('frame(b\'{"id":1,"value":{"x":1}}\')'), ("protocol_error",)),
    Row("two tags", forged('frame(b\'{"id":1,"value":{"t":[],"s":[]}}\')'), ("protocol_error",)),
    Row("a list for a key", forged('frame(b\'{"id":1,"value":{"d":[[[],1]]}}\')'), ("protocol_error",)),
    Row("a pair of three", forged('frame(b\'{"id":1,"value":{"d":[[1,2,3]]}}\')'), ("protocol_error",)),
    Row(
        "a frame of four gigabytes",
        forged('raw(struct.pack(">I16s", 2**32 - 1, channel().nonce))'),
        ("protocol_error",),
    ),
    Row("another nonce", forged('raw(struct.pack(">I16s", 12, bytes(16)) + b"x" * 12)'), ("protocol_error",)),
    Row("half a frame, then nothing", forged('raw(b"\\0" * 10); time.sleep(60)'), TIMEOUT, SHORT),
    Row("half a frame, then the end", forged('raw(b"\\0" * 10); os._exit(0)'), ("crashed",)),
    Row("closes the channel and loops", forged("os.close(channel().write_to)\n    while True: pass"), ("crashed",)),
    Row("closes the channel and sleeps", forged("os.closerange(0, 64); time.sleep(60)"), ("crashed",)),
    Row(
        "keys that collide, a megabyte of them",
        forged(
            'items = b",".join(b\'[{"i":"0x%x"},0]\' % (i * (2**61 - 1)) for i in range(20_000))\n    '
            'frame(b\'{"id":1,"value":{"d":[\' + items + b"]}}")'
        ),
        ("failed", "timeout"),
        3.0,
    ),
    Row(
        "never reads what it is sent",
        "import gc, os, struct\nc = [o for o in gc.get_objects() if type(o).__name__ == 'Channel'][0]\n"
        "p = b'{\"id\":0,\"value\":null}'\nos.write(c.write_to, struct.pack('>I16s', len(p), c.nonce) + p)\n"
        "while True: pass",
        TIMEOUT,
        SHORT,
        test="def check(c):\n    c('x' * 900_000, 1)",
    ),
    Row(
        "returns what the test cannot digest",
        body("return 10**4000"),
        TIMEOUT,
        1.0,
        test="def check(c):\n    c(1, 2) ** 10**7",
    ),
    Row("says it has no memory", forged('frame(b\'{"id":1,"memory":true}\')'), ("memory",)),
    # the checker's own tools
    Row(
        "raises what the test may expect",
        body("raise AssertionError('3')"),
        FAILED,
    ),
    Row(
        "raises an exception that cannot be described",
        "class E(Exception):\n    def __str__(self): raise self\n" + body("raise E"),
        FAILED,
    ),
    Row(
        "raises an exception that never describes itself",
        "class E(Exception):\n    def __str__(self):\n        while True: pass\n" + body("raise E"),
        TIMEOUT,
        SHORT,
    ),
    Row("raises escape sequences", body("raise ValueError('\\x1b[2J\\ud800\\r\\n')"), FAILED),
    Row("raises GeneratorExit", body("raise GeneratorExit"), FAILED),
    Row("raises KeyboardInterrupt", body("raise KeyboardInterrupt"), FAILED),
    Row(
        "raises an exception of a strange class",
        "M = type('M', (type,), {'__name__': property(lambda c: 1 / 0)})\n"
        + body("raise M('E', (BaseException,), {})"),
        FAILED,
    ),
    Row("raises UnicodeDecodeError", body("b'\\xff'.decode()"), FAILED),
    Row(
        "replaces the encoder",
        'import json\njson.dumps = lambda *a, **k: \'{"kind": "passed"}\'\n' + body("return 0"),
        ("failed", "protocol_error"),
    ),
    Row("replaces os.write", "import os\nos.write = lambda *a: 0\n" + body("return 0"), TIMEOUT, SHORT),
    Row(
        "a type whose name is a trap",
        "class T:\n    __module__ = property(lambda s: 1 / 0)\n" + body("return T()"),
        ("failed", "protocol_error"),
    ),
    # signals and processes
    Row(
        "stops itself",
        body("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nreturn 0"),
        ("failed", "timeout"),
        1.5,
    ),
    Row("signals its group", body("import os\nos.kill(0, 9)\nreturn 0"), FAILED),
    Row("signals everybody", body("import os\nos.kill(-1, 9)\nreturn 0"), FAILED),
    Row(
        "ignores every signal",
        body("import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass"),
        TIMEOUT,
        SHORT,
    ),
    Row(
        "blows up threads",
        body("import threading, time\nfor _ in range(10**5): threading.Thread(target=time.sleep, args=(60,)).start()"),
        FAILED,
    ),
    Row(
        "blows up small threads",
        "import threading, time\n"
        + body(
            "threading.stack_size(65536)\nfor made in range(300):\n"
            "    try: threading.Thread(target=time.sleep, args=(60,)).start()\n"
            "    except RuntimeError: return made\n"
        ),
        ("passed",),
        level=3,
        test="def check(c):\n    assert 10 < c(1, 2) < 64",
    ),
    Row("runs another program", body("import os\nos.execv('/usr/bin/env', ['env'])"), FAILED),
    # files and memory
    Row(
        "inherits descriptors",
        body(
            "import os\nfor fd in [*range(3), *range(5, 256)]:\n    try: assert os.fstat(fd).st_rdev == 259, fd\n"
            "    except OSError: assert fd > 4\nreturn a + b"
        ),
        ("passed",),
    ),
    Row(
        "raises its limits",
        body("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))\nreturn 3"),
        FAILED,
    ),
    Row(
        "links out of its folder",
        body("import os\nos.symlink('/etc/passwd', 'x')\nreturn len(open('x').read())"),
        FAILED,
    ),
    Row(
        "shared memory",
        body("import multiprocessing.shared_memory as m\nm.SharedMemory(create=True, size=10)\nreturn a + b"),
        FAILED,
    ),
    Row("a file in memory", body("import os\nos.memfd_create('x')\nreturn a + b"), FAILED),
    Row(
        "fills its folder with directories",
        body("import os\nwhile True:\n    os.mkdir('d')\n    os.chdir('d')"),
        FAILED,
    ),
    Row(
        "calls that nobody needs",
        body(
            "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            "for number in (101, 155, 165, 248, 250, 272, 298, 308, 310, 311, 321, 323, 425, 434, 438, 442):\n"
            "    assert libc.syscall(number, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() in (1, 38), number\n"
            "return a + b"
        ),
        ("passed",),
    ),
    # values
    Row(
        "a long program that is not ASCII",
        body("return a + b") + "#" + "\u20ac" * 300_000,
        ("passed",),
    ),
    Row(
        "a long argument that is not ASCII",
        body("return len(a) + b"),
        ("passed",),
        test="def check(c):\n    assert c('\u20ac' * 500_000, 1) == 500_001",
    ),
    Row(
        "a surrogate is a value like any other",
        body("return '\\ud800\\x00'"),
        ("passed",),
        test="def check(c):\n    assert c(1, 2) == '\\ud800\\x00'",
    ),
    Row(
        "a large integer arrives whole",
        body("return 2**16000 + 1"),
        ("passed",),
        test="def check(c):\n    assert c(1, 2) == 2**16000 + 1",
    ),
    Row("a larger one does not", body("return 2**20000"), ("protocol_error",)),
    Row(
        "kinds are kept",
        body("return [1, 1.0, True, -0.0, (1,), {1: {2}, (1,): b'x'}, None, float('inf')]"),
        ("passed",),
        test="def check(c):\n    told = repr(c(1, 2))\n"
        "    assert told == \"[1, 1.0, True, -0.0, (1,), {1: {2}, (1,): b'x'}, None, inf]\"",
    ),
    Row(
        "subclasses arrive as what they are made of",
        "import collections, enum\nclass E(enum.IntEnum):\n    A = 3\n"
        + body(
            "P = collections.namedtuple('P', 'x')\n"
            "return [collections.Counter('aab'), collections.OrderedDict(x=1), E.A, P(4)]"
        ),
        ("passed",),
        test="def check(c):\n    r = c(1, 2)\n    assert r == [{'a': 2, 'b': 1}, {'x': 1}, 3, (4,)]\n"
        "    assert [type(x) for x in r] == [dict, dict, int, tuple]",
    ),
    Row(
        "an argument cannot be changed here",
        body("a.append(9)\nreturn b"),
        ("passed",),
        test="def check(c):\n    x = [1]\n    assert c(x, 2) == 2 and x == [1]",
    ),
    Row(
        "state lasts from call to call",
        "n = 0\n" + body("global n\nn += 1\nreturn n"),
        ("passed",),
        test="def check(c):\n    assert [c(0, 0), c(0, 0)] == [1, 2]",
    ),
    Row(
        "an expected exception is caught by its kind",
        body("raise ValueError('no')"),
        ("passed",),
        test="def check(c):\n    try:\n        c(1, 2)\n    except ValueError as problem:\n"
        "        assert str(problem) == 'no'\n    else:\n        assert False",
    ),
    Row(
        "a test that swallows everything does not swallow a crash",
        body("import os\nos._exit(0)"),
        ("crashed",),
        test="def check(c):\n    try:\n        c(1, 2)\n    except BaseException:\n        pass",
    ),
    Row(
        "a test that swallows everything does not swallow a timeout",
        body("while True: pass"),
        TIMEOUT,
        SHORT,
        test="def check(c):\n    try:\n        c(1, 2)\n    except BaseException:\n        pass",
    ),
]
"""Attacks on this sandbox in particular, and what it must let through."""
