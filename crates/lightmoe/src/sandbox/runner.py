# Runs the text of a file as a program and ends with the given code if nothing goes wrong.
import os
import sys

path, ended = sys.argv[1:]
try:
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    exec(compile(text, "program", "exec"), {})
except BaseException:
    os._exit(1)
os._exit(int(ended))
