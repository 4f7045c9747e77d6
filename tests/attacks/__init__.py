"""Inputs that somebody made to do harm, or that a machine made at random, and what must happen to them.

The promise for all of them: a command ends with exit code 0 and a right result, or with exit code 2, one line, and
nothing written or changed; within time and memory that the size of the input explains.
"""
