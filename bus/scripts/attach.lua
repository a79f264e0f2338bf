-- Another gateway takes the stream over. Not that of a plain producer: he has nobody else to hear the end from.
-- KEYS job, new out, new gateway's set, old out, old gateway's set, text, tokens. Absent ones are the job's own key.
-- ARGV job, fence, old route, new route, gateway, out_ttl, job_keep.
-- Answers {'attached', state, fence, text_len, deadline, policy}, {'plain', state}, {'ended', state}, {'moved'}, {'unknown'}.
local job_key, out_key, set_key, old_out, old_set, text_key, tokens_key = unpack(KEYS, 1, 7)
local job_id, fence, old_route, new_route, gateway = unpack(ARGV, 1, 5)
local out_ttl, job_keep = tonumber(ARGV[6]), tonumber(ARGV[7])
local h = call('HMGET', job_key, 'state', 'fence', 'route', 'spec', 'place')
if not h[1] then
  return {'unknown'}
elseif h[1] ~= 'queued' and h[1] ~= 'running' then
  return {'ended', h[1]}
elseif h[2] ~= fence or h[3] ~= old_route then
  return {'moved'}
elseif sub(old_route, 1, 6) == 'reply:' then
  return {'plain', h[1]}
end
local model, flags, policy, _, _, deadline = string.match(h[4], SPEC)
local text_len = call('STRLEN', text_key)
call('SREM', old_set == job_key and set_key or old_set, job_id) -- a freeing command first: what follows passes at maxmemory
if old_route ~= new_route then
  call('HSET', job_key, 'route', new_route)
  if old_out ~= out_key then
    try('XADD', old_out, 'NOMKSTREAM', '*', 'type', 'detached', 'job', job_id, 'by', gateway)
  end
end
-- Whoever attaches wants frames, also of a job whose first caller wanted the whole.
if not find(flags, 's', 1, true) then
  call('HSET', job_key, 'spec', model .. ' s' .. (flags == '-' and '' or flags) .. sub(h[4], #model + #flags + 2))
end
call('SADD', set_key, job_id)
keep(set_key, math.max(60000, deadline - now + job_keep))
if h[1] == 'running' then
  send(out_key, out_ttl, 'type', 'marker', 'job', job_id, 'fence', fence, 'node', string.match(h[5], ON_NODE) or '', 'text_len', text_len,
    'token_len', floor(call('STRLEN', tokens_key) / 4))
end
return {'attached', h[1], fence, text_len, deadline, policy}
