-- use: _create
-- Up to 64 jobs of one queue come in, or are found. Answers per job {'existing', state, fence, deadline, route},
-- {'new', 'queued', fence, deadline}, {'refused', code, wait ms, detail, figure},
-- or {'other', record} if the idempotency key has come to name another job.
local answers = {}
local length = call('XLEN', queue_key)
local waiting, last = length, nil

for k = 1, tonumber(ARGV[7]) do
  local j = job_at(k)
  local answer = existing(j)
  local record = not answer and other_record(j)
  if record then
    answer = {'other', record}
  elseif not answer then
    local why
    if sub(j.route, 1, 6) == 'reply:' then
      local kind = call('TYPE', j.out_key).ok
      if kind ~= 'none' and kind ~= 'stream' then
        why = {'bad_reply', 0, kind, 0}
      end
    end
    why = why or refusal(j, waiting)
    if why then
      answer = refuse(j, why)
    else
      answer = create(j)
      waiting, last = waiting + 1, j
    end
  end
  answers[k] = answer
end
announce(last)
return answers
