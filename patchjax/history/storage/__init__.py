"""Files and objects: what lies in a repository, and who moves it.

Imports no array library: what lists a history starts without one."""
