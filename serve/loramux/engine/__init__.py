"""The vLLM integration: the only package of loramux that imports vLLM.

    arguments   our options -> vLLM's arguments          probe      are all hooks there?
    server      start vLLM's OpenAI server in process     plugin     our routes and state on vLLM's app
    worker      the worker class vLLM instantiates        hooks      what is replaced on the model runner instance
    manager     adapters of one worker                    wrappers   adapted linears
    scheduler   ends requests whose adapter is missing    client     the API process's side of the worker
    loads       what a load does between two steps        copies     to the device, beside the steps

Nothing here patches a module or class of vLLM: every hook is an attribute of an instance vLLM made for us, or a
class whose name vLLM takes as an option.
"""
