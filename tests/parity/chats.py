"""Chat templates in the manner of Llama 2 and Llama 3, and conversations to render with them."""

LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}
    {% set system = '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' %}
    {% set messages = messages[1:] %}
{% else %}
    {% set system = '' %}
{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% set content = (system if loop.first else '') + message['content'] %}
    {% if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content | trim + ' [/INST]' }}
    {% else %}
        {{- ' ' + content | trim + ' ' + eos_token }}
    {% endif %}
{% endfor %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message.tool is defined %}
        {{- message.tool | tojson(indent=2) }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message['content'] | trim }}{% endgeneration %}
    {%- else %}
        {{- message['content'] | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

TEMPLATES = {"llama2": LLAMA2, "llama3": LLAMA3}

QUESTION = {"role": "user", "content": "  Where is the <needle>? "}
ANSWER = {"role": "assistant", "content": 'In the "hay", où d\'autre? \U0001f33e'}
CONVERSATIONS = {
    "question": [QUESTION],
    "system": [{"role": "system", "content": "Be brief.\n"}, QUESTION],
    "follow_up": [QUESTION, ANSWER, {"role": "user", "content": "Sure?"}],
    "closed": [QUESTION, ANSWER],
    "extra_keys": [QUESTION | {"tool": {"name": "<é>", "size": [1, 2]}, "name": None}],
}
