"""SGLang servers.

server.py   a server as a child process
leash.py    ends a server when the process that started it ends
client.py   HTTP client of one server
router.py   assignment of episodes to servers
group.py    all servers of a run
"""
