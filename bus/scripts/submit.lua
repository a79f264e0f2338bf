-- use: _create
-- A job comes in, or is found. Answers {'existing', state, fence, deadline, route}, {'new', 'queued', fence, deadline}
-- or {'refused', code, wait ms, detail, figure}.
local h = call('HMGET', job_key, 'state', 'attempt', 'nonce', 'deadline', 'route')
if h[1] then
  return {'existing', h[1], h[2] .. '.' .. h[3], h[4], h[5]}
end
if sub(route, 1, 6) == 'reply:' then
  local kind = call('TYPE', out_key).ok
  if kind ~= 'none' and kind ~= 'stream' then
    return refuse({'refused', 'bad_reply', 0, kind, 0})
  end
end
local waiting = call('XLEN', queue_key)
local answer = refusal(waiting)
if answer then
  return refuse(answer)
end
local deadline = create(waiting)
return {'new', 'queued', attempt_floor .. '.' .. (redrive and 'r' or '0'), deadline}
