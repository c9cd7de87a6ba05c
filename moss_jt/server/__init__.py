"""The HTTP server: MOSS's own API and OpenAI's over one engine in a process of its own.

    link, worker            the process that has the model; plain messages over a pipe
    process, dispatch       the server's end: start it again when it dies; who is next, who waits, who is refused
    prompts, calls          what a client sends, as ids; tools
    tool_runner             the tools of a ToolBox, for answers
    tool_threads            their threads: who has tools that hang stands in nobody else's way
    answers, warm           ids as they come, as text; which cache a new prompt continues
    database, keys, store   what is kept: API keys, conversations
    chats                   a conversation of MOSS's own API: its prompt, its answer, its place in the store
    guard, wire, streams    hostile and absent clients: sizes, times, half requests, gone readers
    schemas, routes_*       the routes; app joins them; running binds, serves and ends

The server's own process never imports Jittor. FastAPI, uvicorn and prometheus-client come with the extra `serve`.
"""
