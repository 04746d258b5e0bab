"""SGLang servers.

server.py   one server as a child process
leash.py    ends a server with the process that asked for it
client.py   one server over HTTP
router.py   which server an episode runs on
group.py    all servers
"""
