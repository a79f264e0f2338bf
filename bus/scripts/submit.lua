-- use: _create
-- A job comes in, or is found. Answers {'existing', state, fence, deadline, route}, {'new', 'queued', fence, deadline}
-- or {'refused', code, wait ms, detail, figure}.
local found = existing()
if found then
  return found
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
local fence, deadline = create(waiting)
return {'new', 'queued', fence, deadline}
