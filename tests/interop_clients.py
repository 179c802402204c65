"""Do the clients that people use talk to our server as they come? `make clients` runs this.

langchain-openai, LlamaIndex and LiteLLM pull in more than a hundred packages that the project does not need, so they have an
environment of their own (requirements/clients.txt), and OpenAI's npm package a folder. This script runs in both: in the
project's it starts a server with a tiny model, then it calls itself with the other environment's Python, and Node.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

QUESTION = "Who wrote the letter?"
NODE = """
import OpenAI from "openai";
const [address, model, question] = process.argv.slice(-3);
const client = new OpenAI({baseURL: address, apiKey: "none", maxRetries: 0});
const messages = [{role: "user", content: question}];
const whole = await client.chat.completions.create({model, messages, max_tokens: 6, temperature: 0});
let text = "";
for await (const part of await client.chat.completions.create({model, messages, max_tokens: 6, temperature: 0, stream: true}))
  text += part.choices[0]?.delta?.content ?? "";
const response = await client.responses.create({model, input: question, max_output_tokens: 6, temperature: 0});
console.log(JSON.stringify([whole.choices[0].message.content, text, response.output_text]));
"""


def langchain(address: str, model: str) -> list[str]:
    "langchain-openai: whole and streamed."
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=address, api_key="none", model=model, max_tokens=6, temperature=0, max_retries=0)
    return [chat.invoke(QUESTION).content, "".join(part.content for part in chat.stream(QUESTION))]


def llama_index(address: str, model: str) -> list[str]:
    "LlamaIndex, for a server like OpenAI's: whole and streamed."
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    chat = OpenAILike(
        api_base=address, api_key="none", model=model, max_tokens=6, temperature=0, is_chat_model=True, max_retries=0
    )
    messages = [ChatMessage(role="user", content=QUESTION)]
    return [chat.chat(messages).message.content, "".join(part.delta or "" for part in chat.stream_chat(messages))]


def litellm(address: str, model: str) -> list[str]:
    "LiteLLM: whole and streamed."
    from litellm import completion

    asked = {"model": f"openai/{model}", "api_base": address, "api_key": "none", "max_tokens": 6, "temperature": 0}
    messages = [{"role": "user", "content": QUESTION}]
    whole = completion(messages=messages, **asked)
    parts = completion(messages=messages, stream=True, **asked)
    return [whole.choices[0].message.content, "".join(part.choices[0].delta.content or "" for part in parts)]


def openai(address: str, model: str) -> list[str]:
    "OpenAI's own: whole, streamed, and the responses address."
    from openai import OpenAI

    client, messages = OpenAI(base_url=address, api_key="none", max_retries=0), [{"role": "user", "content": QUESTION}]
    asked = {"model": model, "messages": messages, "max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    parts = client.chat.completions.create(stream=True, **asked)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    response = client.responses.create(model=model, input=QUESTION, max_output_tokens=6, temperature=0)
    return [whole, text, response.output_text]


CLIENTS = {"openai": openai, "langchain-openai": langchain, "llama-index": llama_index, "litellm": litellm}


def run_client(command: list[str], **more: str) -> list[str]:
    "What a client printed last, as JSON."
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | more)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=".venv-clients/bin/python", help="of the other environment")
    parser.add_argument("--node-modules", default=".venv-clients/npm", help="folder in which `npm install openai` ran")
    parser.add_argument("--inside", nargs=3, metavar=("CLIENT", "ADDRESS", "MODEL"), help="ask with one of them")
    args = parser.parse_args()
    if args.inside:
        name, address, model = args.inside
        print(json.dumps(CLIENTS[name](address, model)))
        return
    from llmops.deployment.serving import open_client
    from llmops.studies.soak import tiny_server

    wrong = 0
    with tiny_server("llamacpp") as (address, _):
        client, model = open_client(address)
        client.close()
        said = {name: run_client([args.python, __file__, "--inside", name, address, model]) for name in CLIENTS}
        folder = Path(args.node_modules)
        if (folder / "node_modules/openai").is_dir():
            (folder / "ask.mjs").write_text(NODE)
            said["openai (npm)"] = run_client(["node", str(folder / "ask.mjs"), address, model, QUESTION])
        else:
            print("openai (npm): not installed, not tried")
        for name, answers in said.items():
            same = len(set(answers)) == 1 and answers[0]
            wrong += not same
            print(f"{name}: {'the same answer in each way' if same else f'differs: {answers}'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
